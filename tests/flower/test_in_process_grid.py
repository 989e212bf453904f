"""The grid without processes: what a client returns reaches the server as on the other grids."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgpt.flower.in_process_grid import InProcessGrid
from fedgpt.flower.local_grid import FIRST_NODE
from fedgpt.flower.messages import read_reply, update_content

BUFFER = np.zeros(3, np.float32)
app = ClientApp()


@app.train()
def train(message, context):
    """A client that has one buffer for the updates of all its jobs."""
    BUFFER[:] += 1
    return Message(update_content("{}", BUFFER), reply_to=message)


@app.query()
def damaged(message, context):
    content = update_content("{}", BUFFER)
    array = Array("float32", (3,), "numpy.ndarray", b"no bytes of np.save")
    content["delta"] = ArrayRecord(dict.fromkeys(content["delta"], array))
    return Message(content, reply_to=message)


def reply_to(grid: InProcessGrid, kind: str) -> Message:
    (sent,) = grid.push_messages([Message(RecordDict(), FIRST_NODE, kind)])
    assert grid.wait()
    (reply,) = grid.pull_messages([sent])
    return reply


def test_the_next_job_of_a_client_does_not_change_its_reply():
    grid = InProcessGrid(app, 1, {}, "")
    one, two = (reply_to(grid, "train") for _ in range(2))
    first, second = (read_reply(reply, "a", 0).payload for reply in (one, two))
    assert first is not None and second is not None
    assert (second - first).tolist() == [1, 1, 1]


def test_an_array_with_damaged_bytes_is_the_failure_of_its_client_only():
    reply = read_reply(reply_to(InProcessGrid(app, 1, {}, ""), "query"), "a", 0)
    assert reply.error and reply.code == "bad_encoding"
