"""Messages: what a reply holds is free again when it is read."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.core.messages import Job, Plan
from fedgpt.flower.messages import job_content, read_job, read_reply, update_content, vector_record


@pytest.fixture(autouse=True)
def no_collector():
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    gc.disable()
    yield
    gc.enable()


class Vector(np.ndarray):
    """An array that can be watched."""


def vector() -> np.ndarray:
    return np.zeros(10, np.float32).view(Vector)


def test_a_reply_that_was_read_keeps_no_vector_alive():
    array = vector()
    watched = weakref.ref(array)
    message = Message(update_content("{}", array), 5, MessageType.TRAIN)
    reply = read_reply(message, "a", 0)
    assert reply.payload is array and reply.header == "{}"
    del message, reply, array
    assert watched() is None, "only the garbage collector would free it"


def test_a_job_that_was_read_keeps_no_vector_alive():
    array = vector()
    watched = weakref.ref(array)
    plan = Plan("run", 1, 0, 1, 1, keep=(1, 2))
    job = Job("a", 3, 2, array, plan, 4.5)
    message = Message(job_content(job, vector_record(array)), 5, MessageType.TRAIN)
    read = read_job(message)
    about = (read.client, read.task, read.version, read.plan)
    del message, read, job, array
    assert watched() is None
    assert about == ("a", 3, 2, plan)


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"update": ArrayRecord(), "delta": ArrayRecord()})])
def test_a_reply_of_another_kind_is_unreadable(content):
    reply = read_reply(Message(content, 5, MessageType.TRAIN), "a", 0)
    assert reply.error.startswith("unreadable reply") and reply.payload is None
