"""A ServerApp and a ClientApp without a model: the server sends jobs and notes the replies."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server, client = ServerApp(), ClientApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Ask all nodes `rounds` times to add 1 to an array; each reply is a line of the file `out`."""
    config, array = context.run_config, np.arange(1 << 20, dtype=np.float32)
    with Path(config["out"]).open("a", buffering=1) as out:
        out.write(json.dumps({"pid": os.getpid()}) + "\n")
        while len(nodes := sorted(grid.get_node_ids())) < config["nodes"]:
            time.sleep(0.2)
        for number in range(config["rounds"]):
            content = RecordDict({"arrays": ArrayRecord([array])})
            waiting = list(grid.push_messages([Message(content, node, "train") for node in nodes]))
            while waiting:
                for reply in grid.pull_messages(waiting):
                    waiting.remove(reply.metadata.reply_to_message_id)
                    line = {"round": number, "node": reply.metadata.src_node_id}
                    if reply.has_error():
                        line["error"] = reply.error.reason
                    else:
                        got = reply.content["arrays"].to_numpy_ndarrays()[0]
                        line["right"] = bool(np.array_equal(got, array + 1))
                    out.write(json.dumps(line) + "\n")
                time.sleep(0.05)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Add 1."""
    arrays = [array + 1 for array in message.content["arrays"].to_numpy_ndarrays()]
    return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=message)
