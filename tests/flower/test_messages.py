"""Messages: reading a reply leaves no reference to its arrays, and accepts no malformed content."""

from __future__ import annotations

import gc
import io
import pickle
import weakref

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode, SType
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import ClientInfo, Job, Plan
from fedgpt.flower.messages import (
    MOST_REASON,
    info_content,
    job_content,
    read_info,
    read_job,
    read_reply,
    refusal_content,
    update_content,
    vector_record,
)
from fedgpt.update.wire import REASONS


@pytest.fixture(autouse=True)
def no_collector():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    gc.disable()
    yield
    gc.enable()


class Vector(np.ndarray):
    """An array to which a weak reference can be made."""


def vector() -> np.ndarray:
    return np.zeros(10, np.float32).view(Vector)


def test_reading_a_reply_leaves_no_reference_to_its_vector():
    array = vector()
    watched = weakref.ref(array)
    message = Message(update_content("{}", array), 5, MessageType.TRAIN)
    reply = read_reply(message, "a", 0)
    assert reply.payload is array and reply.header == "{}"
    del message, reply, array
    assert watched() is None, "only the garbage collector would free it"


def test_reading_a_job_leaves_no_reference_to_its_vector():
    array = vector()
    watched = weakref.ref(array)
    plan = Plan("run", 1, 0, 1, 1, keep=(1, 2))
    job = Job("a", 3, 2, array, plan, 4.5)
    message = Message(job_content(job, vector_record(array)), 5, MessageType.TRAIN)
    read = read_job(message)
    about = (read.client, read.number, read.version, read.plan)
    del message, read, job, array
    assert watched() is None
    assert about == ("a", 3, 2, plan)


# ---- malicious content instead of an array


def npy(array: np.ndarray, **how) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, flat=array)
    return buffer.getvalue()


NUMBERS = np.arange(64, dtype=np.float32)
GOOD = npy(NUMBERS)


def wire(data: bytes, stype: str = SType.NUMPY, **more: Array) -> ArrayRecord:
    return ArrayRecord({"flat": Array("float32", (64,), stype, data), **more})


def without_bytes() -> ArrayRecord:
    """An array that raises another error than those of a damaged one when it is read."""
    record = wire(GOOD)
    del record["flat"].data
    return record


def content(delta: object = None, update: object = None, **more: object) -> RecordDict:
    header = ConfigRecord({"json": "{}"})
    delta = wire(GOOD) if delta is None else delta
    return RecordDict({"update": update or header, "delta": delta, **more})


def test_an_array_from_the_wire_is_read():
    reply = read_reply(Message(content(), 5, MessageType.TRAIN), "a", 0)
    assert not reply.error and reply.header == "{}" and reply.bytes == NUMBERS.nbytes + 2
    np.testing.assert_array_equal(reply.payload, NUMBERS)
    assert reply.payload.dtype == np.float32


FIRST = GOOD.index(b"(64,)")
# a header of the same length, so that the data begins at the same offset
BOMB = GOOD[:FIRST] + b"(9999999999999,), }" + GOOD[FIRST + 19 :]
CONTENTS = {
    "npz": (content(wire(npz(NUMBERS))), "bad_encoding"),
    "zip": (content(wire(b"PK\x03\x04" + GOOD)), "bad_encoding"),
    "pickle": (content(wire(pickle.dumps([1.0]))), "bad_encoding"),
    "pickled objects": (content(wire(npy(np.array([{}, "x"], object)))), "pickle_refused"),
    "bomb": (content(wire(BOMB)), "size_mismatch"),
    "header of 4 GB": (content(wire(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + GOOD)), "bad_encoding"),
    "no header": (content(wire(GOOD[:40])), "bad_encoding"),
    "truncated": (content(wire(GOOD[:-1])), "size_mismatch"),
    "trailing": (content(wire(GOOD + b"\0")), "size_mismatch"),
    "twice": (content(wire(GOOD + GOOD)), "size_mismatch"),
    "columns first": (content(wire(npy(np.asfortranarray(NUMBERS.reshape(8, 8))))), "bad_encoding"),
    "garbage": (content(wire(bytes(range(256)))), "bad_encoding"),
    "empty": (content(wire(b"")), "bad_encoding"),
    "no bytes": (content(without_bytes()), "bad_encoding"),
    "other stype": (content(wire(GOOD, "torch.Tensor")), "bad_encoding"),
    "renamed array": (content(ArrayRecord({"flat2": Array(NUMBERS)})), "missing_key"),
    "no array": (content(ArrayRecord({})), "missing_key"),
    "two arrays": (content(wire(GOOD, more=Array(NUMBERS))), "extra_key"),
    "more of the header": (content(update=ConfigRecord({"json": "{}", "x": 1})), "extra_key"),
    "renamed header": (content(update=ConfigRecord({"text": "{}"})), "missing_key"),
    "header of bytes": (content(update=ConfigRecord({"json": b"{}"})), "bad_encoding"),
    "one record more": (content(more=ConfigRecord({})), "extra_key"),
    "nothing": (RecordDict(), "missing_key"),
    "arrays for a header": (
        RecordDict({"update": wire(GOOD), "delta": wire(GOOD)}),
        "bad_encoding",
    ),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_malformed_replies_are_errors_with_a_documented_code(name):
    message, code = CONTENTS[name]
    reply = read_reply(Message(message, 5, MessageType.TRAIN), "a", 0)
    assert reply.code == code and code in REASONS and reply.payload is None
    assert 0 < len(reply.error) < 200, "the error must fit a line of a log"


def test_what_a_client_says_of_itself_cannot_add_lines_to_a_log():
    hostile = "1.0\n2026-11-28 INFO all is well \x1b[2J" + "x" * 999
    content = info_content(ClientInfo("ann", 9), "d")
    content["versions"] = ConfigRecord({"torch": hostile, "fedgpt": "1.0"})
    told = read_info(Message(content, 5, MessageType.QUERY)).versions
    assert (
        told["torch"].startswith("1.0 2026-11-28 INFO all is well [2J") and told["fedgpt"] == "1.0"
    )
    assert told["torch"].isprintable() and len(told["torch"]) <= 60
    with pytest.raises(ConfigError) as refused:
        read_info(Message(refusal_content([hostile] * 99), 5, MessageType.QUERY))
    assert len(refused.value.problems) == 20
    assert all(one.isprintable() and len(one) <= MOST_REASON for one in refused.value.problems)
    content = info_content(ClientInfo("ann\x1b[2J", 9), "d")
    with pytest.raises(ValueError, match="no name"):
        read_info(Message(content, 5, MessageType.QUERY))


def test_the_error_of_a_client_is_cut_to_a_maximum_length():
    asked = Message(RecordDict(), 5, MessageType.TRAIN)
    asked.metadata.__dict__["_message_id"] = "1"
    message = Message(
        Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "private text " * 10_000), reply_to=asked
    )
    reply = read_reply(message, "a", 0)
    assert reply.error.startswith("code 2: private") and len(reply.error) == MOST_REASON
    assert reply.code == "client_error"
