"""A ClientApp without a model: `config["do"]` chooses what it does."""

import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedgpt.flower.pool.shared_memory import array_record

app = ClientApp()
not_an_app = 3


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content.config_records.get("config", {})
    match config.get("do"):
        case "raise":
            raise KeyError("no such thing")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            raise SystemExit(7)
        case "sleep":
            time.sleep(config["seconds"])
        case "nothing":
            return None
    metrics = {"pid": os.getpid(), "partition": context.node_config["partition-id"]}
    metrics["threads"] = int(os.environ["OMP_NUM_THREADS"])
    metrics["gpu"] = int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1)
    content = RecordDict({"metrics": MetricRecord(metrics)})
    for name, record in message.content.array_records.items():
        arrays = {key: array.numpy() for key, array in record.items()}
        content["metrics"]["writeable"] = sum(int(a.flags.writeable) for a in arrays.values())
        content["metrics"]["inode"] = _inode_of(next(iter(arrays.values())))
        content[name] = array_record({key: (a + 1).astype(a.dtype) for key, a in arrays.items()})
    return Message(content, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    answer = {"run": context.run_id, "node": context.node_id, "hello": context.run_config["hello"]}
    answer |= {
        "raw": b"\x00\xff",
        "clients": context.node_config["num-partitions"],
        "flags": [True, False],
        "states": len(context.state),
    }
    content = RecordDict({"answer": ConfigRecord(answer), "echo": message.content["config"]})
    context.state["seen"] = ConfigRecord({"yes": True})
    return Message(content, reply_to=message)


def _inode_of(array: np.ndarray) -> int:
    """Inode of the mapping that contains an array: one for each piece of shared memory."""
    address = array.__array_interface__["data"][0]
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            span, _, _, _, inode, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return int(inode)
    return 0
