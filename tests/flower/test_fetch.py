"""Replies fetched from a real SuperLink while other clients are slow, broken off or malicious."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.run import RunNotRunningException
from support.superlink import LiveSuperLink, in_thread, next_message, send

from fedgpt.core.errors import FedGPTError, UpdateRejected
from fedgpt.flower import fetch
from fedgpt.flower.deploy.connection import UploadEnded
from fedgpt.flower.fetch import Fetcher
from fedgpt.flower.messages import read_reply, update_content
from fedgpt.flower.objects import CHUNK, is_within, order

MODEL = 12_000_000  # bytes of the vectors in these tests: three chunks


class Site:
    """A node that got a job, and what the server fetches of it."""

    def __init__(self, link: LiveSuperLink, grid, fetcher: Fetcher, largest: int = 2 * MODEL):
        node, self.connection = link.node()
        (self.id,) = grid.push_messages([Message(RecordDict(), node, MessageType.TRAIN)])
        fetcher.watch(self.id, largest)
        self.job = next_message(self.connection)

    def announce(self, vector: np.ndarray):
        reply = Message(update_content("{}", vector), reply_to=self.job)
        return self.connection.announce(reply, 0.1)

    def reply(self, vector: np.ndarray, pause: float = 0.0) -> None:
        send(self.connection, Message(update_content("{}", vector), reply_to=self.job), pause)


class Server:
    def __init__(self, link: LiveSuperLink):
        self.grid = link.grid()
        self.fetcher = Fetcher(self.grid)

    def take(self, seconds: float = 20.0) -> tuple[str, Message | Exception]:
        deadline = time.monotonic() + seconds
        while (found := self.fetcher.take()) is None:
            assert time.monotonic() < deadline, "no reply"
            self.fetcher.wait(0.1)
        return found


@pytest.fixture
def server(link) -> Iterator[Server]:
    one = Server(link)
    yield one
    one.fetcher.close()


def vector(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(MODEL // 4, dtype=np.float32)


def payload(reply: Message | Exception) -> np.ndarray:
    assert isinstance(reply, Message)
    found = read_reply(reply, "a", 0)
    assert found.error == ""
    return found.payload


@pytest.mark.parametrize("in_memory", [fetch.IN_MEMORY, 1000], ids=["in memory", "in a file"])
def test_a_reply_arrives_with_its_bits(link, server, monkeypatch, in_memory):
    monkeypatch.setattr(fetch, "IN_MEMORY", in_memory)
    site = Site(link, server.grid, server.fetcher)
    site.reply(vector())
    message_id, reply = server.take()
    assert message_id == site.id and np.array_equal(payload(reply), vector())
    assert reply.metadata.reply_to_message_id == site.id
    assert server.fetcher.take() is None, "each reply is taken once"


def test_a_slow_upload_holds_up_no_other_reply(link, server):
    slow, quick = (Site(link, server.grid, server.fetcher) for _ in range(2))
    upload = in_thread(lambda: slow.reply(vector(1), pause=0.4))
    time.sleep(0.6)  # it is under way
    quick.reply(vector(2))
    message_id, reply = server.take()
    assert message_id == quick.id and upload.is_alive()
    assert np.array_equal(payload(reply), vector(2))
    message_id, reply = server.take()
    assert message_id == slow.id and np.array_equal(payload(reply), vector(1))


def test_an_upload_that_is_broken_off_costs_its_client_alone(link, server, monkeypatch):
    monkeypatch.setattr(in_memory_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS", 1)
    broken, honest = (Site(link, server.grid, server.fetcher) for _ in range(2))
    broken.announce(vector(1))
    honest.reply(vector(2))
    found = dict(server.take() for _ in range(2))  # on a busy machine in any order
    error = found[broken.id]
    assert isinstance(found[honest.id], Message) and isinstance(error, UpdateRejected)
    assert error.code == "no_reply" and "broken off" in error.detail


def counted(monkeypatch, server: Server) -> list[str]:
    """The ids of the objects that the server asks for from now on."""
    asked, client = [], server.fetcher._client
    pull = client.PullObject

    def counting(request):
        asked.append(request.object_id)
        return pull(request)

    monkeypatch.setattr(client, "PullObject", counting)
    return asked


def test_a_reply_of_too_many_objects_is_refused_unread(link, server, monkeypatch):
    site = Site(link, server.grid, server.fetcher, largest=1000)
    asked = counted(monkeypatch, server)
    site.announce(np.random.default_rng(0).random(30_000_000, dtype=np.float32))
    message_id, error = server.take()
    assert message_id == site.id and isinstance(error, UpdateRejected)
    assert error.code == "too_large" and asked == []


def test_a_small_upload_that_would_fill_the_memory_is_refused_before_it_does(link, server):
    """All chunks of an array of zeros are one object, which is uploaded once."""
    site = Site(link, server.grid, server.fetcher)
    upload = site.announce(np.zeros(50_000_000, np.float32))
    assert len(upload.objects) < 10, "200 MB are announced, and 10 MB are uploaded"
    tracemalloc.start()
    while site.connection.upload(upload):
        pass
    _, error = server.take()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, UpdateRejected) and error.code == "too_large"
    assert error.detail.startswith("arrays of 200") and peak < 100_000_000


@pytest.mark.parametrize(
    "many",
    [
        ConfigRecord({"json": "{}", "numbers": [7] * 300_000}),
        MetricRecord({f"name {number}": number for number in range(20_000)}),
    ],
    ids=["numbers", "names"],
)
def test_records_that_python_would_make_many_objects_of_are_refused_unread(
    link, server, monkeypatch, many
):
    monkeypatch.setattr(fetch, "put_together", None)
    site = Site(link, server.grid, server.fetcher)
    content = RecordDict({**update_content("{}", vector()), "more": many})
    with suppress(UploadEnded):  # the server wants no more of it
        send(site.connection, Message(content, reply_to=site.job))
    message_id, error = server.take()
    assert message_id == site.id and isinstance(error, UpdateRejected)
    assert error.code == "too_large" and error.detail.endswith("262144 of other objects")


def test_what_is_no_object_costs_its_reply_alone(link, server, monkeypatch):
    """A link of another kind may hand it out."""
    bad, good = (Site(link, server.grid, server.fetcher) for _ in range(2))
    get = link.state.get_object
    bad.announce(vector(1))
    monkeypatch.setattr(link.state, "get_object", lambda *of: get(*of) or b"not an object")
    message_id, error = server.take()
    assert message_id == bad.id and isinstance(error, ValueError)
    monkeypatch.undo()
    good.reply(vector(2))
    assert server.take()[0] == good.id


def test_the_reply_to_a_job_that_was_given_up_is_not_fetched(link, server, monkeypatch):
    before, during, other = (Site(link, server.grid, server.fetcher) for _ in range(3))
    asked = counted(monkeypatch, server)
    server.fetcher.cancel([before.id])
    before.announce(vector(1))
    message_id, error = server.take()
    assert message_id == before.id and isinstance(error, UpdateRejected)
    assert error.code == "late" and asked == []
    during.announce(vector(2))
    deadline = time.monotonic() + 10
    while not asked:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.fetcher.cancel([during.id])
    assert server.take()[0] == during.id
    other.reply(vector(3))
    assert server.take()[0] == other.id


def test_a_client_that_goes_away_is_an_error_of_its_job(link, server):
    site = Site(link, server.grid, server.fetcher)
    node = site.job.metadata.dst_node_id
    assert node in wait_for(server.fetcher.nodes)
    link.lose(node)
    message_id, reply = server.take()
    assert message_id == site.id and reply.has_error() and reply.error.code == 5
    wait_for(lambda: node not in server.fetcher.nodes())
    assert site.connection.heartbeat()
    wait_for(lambda: node in server.fetcher.nodes())


def wait_for(found):
    deadline = time.monotonic() + 10
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_what_ends_the_thread_reaches_the_server(link, server, monkeypatch):
    """Flower reports the end of a run with an exception that is no Exception."""

    def stopped(request):
        raise RunNotRunningException

    monkeypatch.setattr(server.fetcher._client, "GetNodes", stopped)
    with pytest.raises(RunNotRunningException):
        server.take()


def failing_link(link: LiveSuperLink, monkeypatch, times: int | None) -> None:
    """Let the SuperLink answer so many questions for replies, or all, with status 500."""
    get, left = link.state.get_message_res, iter(repeat(0) if times is None else range(times))

    def fails(**about):
        if next(left, None) is not None:
            raise TypeError("as for a row without a time")
        return get(**about)

    monkeypatch.setattr(link.state, "get_message_res", fails)


def test_a_question_that_the_superlink_fails_to_answer_is_asked_again(
    link, server, monkeypatch, caplog
):
    failing_link(link, monkeypatch, 2)
    site = Site(link, server.grid, server.fetcher)
    site.reply(vector())
    assert np.array_equal(payload(server.take()[1]), vector())
    lines = [record.message for record in caplog.records if record.name == fetch.__name__]
    asked = "the SuperLink answers /v1/runtime/pull-messages with status 500; asking again in"
    assert lines[:2] == [f"{asked} 0.5 s", f"{asked} 1.0 s"]
    assert lines[2:] == ["the SuperLink answers again"]


def test_a_superlink_that_answers_no_question_for_long_ends_the_run_with_its_reason(
    link, server, monkeypatch
):
    monkeypatch.setattr(fetch, "FAILING_SECONDS", 0.4)
    failing_link(link, monkeypatch, None)
    Site(link, server.grid, server.fetcher)
    with pytest.raises(FedGPTError, match="answered /v1/runtime/pull-messages with status 500 for"):
        server.take()


def test_closing_ends_the_thread(link):
    one = Fetcher(link.grid())
    assert any(thread.name == "replies" for thread in threading.enumerate())
    one.close()
    assert not any(thread.name == "replies" for thread in threading.enumerate())


def test_the_objects_of_a_tree_count_with_repeats():
    leaf = ObjectTree(object_id="leaf")
    tree = ObjectTree(object_id="root", children=[leaf] * 5)
    assert order(tree) == (["root"], ["leaf"])
    assert is_within(tree, 6) and not is_within(tree, 5)
    deep = ObjectTree(object_id="0")
    for number in range(1, 90):
        deep = ObjectTree(object_id=str(number), children=[deep])
    assert is_within(deep, 90) and not is_within(deep, 89)
    assert CHUNK == 5 * 2**20, "Flower's own size, which the bound relies on"
