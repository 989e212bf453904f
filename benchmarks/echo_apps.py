"""What benchmarks/link.py sends: a server's vector and a client's answer, without any training.

The ServerApp sends a vector as a job is sent, and fetches the reply as a run does. The client is
the persistent one of `fedgpt client`: python benchmarks/echo_apps.py KIT
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from fedgpt.flower.mailbox import mailbox_of
from fedgpt.flower.messages import ARRAY, read_reply, update_content, values_of, vector_record
from fedgpt.flower.push import push

server = ServerApp()
SECONDS = 900.0  # for one trip, on a machine that does other things


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{field}:")[2].split()[0])


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send a vector `rounds` times; each trip is a line of the file `out`."""
    options, idle = context.run_config, memory("VmRSS")
    vector = np.random.default_rng(0).random(int(options["numbers"]), dtype=np.float32)
    mailbox = mailbox_of(grid)
    with Path(str(options["out"])).open("a", buffering=1) as out:
        while not (nodes := list(mailbox.nodes())):
            time.sleep(0.1)
        for _ in range(int(options["rounds"])):
            vector += 1e-3  # of a new version every object is new
            began, computed = time.monotonic(), time.process_time()
            content = RecordDict(
                {"params": vector_record(vector), "job": ConfigRecord({"json": "{}"})}
            )
            (number,) = push(grid, [Message(content, nodes[0], MessageType.TRAIN)])
            assert number is not None, "the client has left"
            mailbox.watch(number, 2 * vector.nbytes)
            while not (arrived := mailbox.take()):
                assert time.monotonic() < began + SECONDS, "no reply"
                mailbox.wait(1.0)
            message = arrived[0].reply
            assert isinstance(message, Message), message
            reply = read_reply(message, "client", 0)
            assert reply.payload.shape == vector.shape, reply.error
            seconds = time.monotonic() - began - float(json.loads(reply.header)["work"])
            del content, arrived, message, reply
            line = {"pid": os.getpid(), "seconds": seconds, "cpu": time.process_time() - computed}
            out.write(json.dumps({**line, "idle": idle, "peak": memory("VmHWM")}) + "\n")
    mailbox.close()


def answer(message: Message, context: Context) -> Message:
    """A vector of the same size, with the seconds that it took to make."""
    began = time.monotonic()
    record = message.content["params"]
    assert isinstance(record, ArrayRecord)
    delta = values_of(record[ARRAY]) + np.float32(1)
    header = json.dumps({"work": time.monotonic() - began})
    return Message(update_content(header, delta), reply_to=message)


if __name__ == "__main__":
    from fedgpt.flower.deploy.doctor import KitConnection
    from fedgpt.flower.deploy.kit import read_kit
    from fedgpt.flower.deploy.node import PersistentNode

    node = PersistentNode(KitConnection(read_kit(sys.argv[1]), "localhost"), answer, {})
    signal.signal(signal.SIGTERM, lambda *_: node.stop())
    node.run()
