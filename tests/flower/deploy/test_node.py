"""A persistent client, in a process of its own, at a real SuperLink that goes and comes back."""

from __future__ import annotations

import json
import logging
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from support.advice import advises
from support.site_server import SiteServer
from support.superlink import LiveSuperLink, in_thread, next_message, persistent_node

from fedgpt.flower.deploy import connection as connection_module
from fedgpt.flower.deploy import node as node_module
from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.doctor import KitConnection
from fedgpt.flower.deploy.guard import FLEET, App, Guard
from fedgpt.flower.deploy.kit import read_kit
from fedgpt.flower.deploy.limits import Record
from fedgpt.flower.deploy.node import NotAccepted, PersistentNode, _Heartbeats
from fedgpt.flower.fetch import Fetcher
from fedgpt.flower.objects import CHUNK, OTHER_OBJECTS

REPEATED = ("pull-messages", "pull-object", "push-messages", "push-object")  # kinds of requests


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


class Server:
    """Asks the node with a key, and waits for its answers."""

    def __init__(self, link: LiveSuperLink, key: ec.EllipticCurvePrivateKey):
        self.node, self.grid = link.registered(key), link.grid()
        self.fetcher = Fetcher(self.grid)

    def online(self) -> bool:
        return self.node in self.fetcher.nodes()

    def wait_until(self, online: bool) -> None:
        deadline = time.monotonic() + 90
        while self.online() != online:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def ask(self, *values: np.ndarray, **about: Any) -> str:
        """Ask; the id of the message."""
        content = RecordDict({"about": ConfigRecord(about)})
        if values:
            content["values"] = ArrayRecord({"all": Array(np.concatenate(values))})
        (number,) = self.grid.push_messages([Message(content, self.node, MessageType.TRAIN)])
        self.fetcher.watch(number, 1000)
        return number

    def answer(self, seconds: float = 90.0) -> Message:
        deadline = time.monotonic() + seconds
        while (found := self.fetcher.take()) is None:
            assert time.monotonic() < deadline, "no answer"
            self.fetcher.wait(0.1)
        assert isinstance(found[1], Message)
        return found[1]


def announced(
    link: LiveSuperLink, server: Server, chunks: int = 0
) -> tuple[Message, Callable[[], None]]:
    """A message of which the node is told, and a function that sends its content."""
    TaskIdentity.run_id, TaskIdentity.node_id = link.run_id, SUPERLINK_NODE_ID
    content = RecordDict({"about": ConfigRecord({"number": 1})})
    if chunks:
        values = np.arange(chunks, dtype=np.int64).repeat(CHUNK // 8)
        content["values"] = ArrayRecord({"all": Array(values)})
    message = Message(content, server.node, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    session = link.state.start_session(link.run_id)
    about = remove_content_from_message(message)  # as a grid sends it
    link.state.store_message_and_object_tree(about, get_object_tree(message), session)

    def send() -> None:
        for key, one in get_all_nested_objects(message).items():
            assert link.state.store_object(link.run_id, session, key, one.deflate())

    return message, send


def failing_once(
    app: App, status: int, failed: list[str], kinds: tuple[str, ...] = REPEATED
) -> App:
    """The application, but the second request of each kind is answered with a status."""
    asked: Counter[str] = Counter()

    async def front(scope, receive, send) -> None:
        what = scope["path"].removeprefix(FLEET)
        asked[what] += 1
        if what not in kinds or asked[what] != 2:
            return await app(scope, receive, send)
        failed.append(what)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return front


def damaging(app: App, what: str, answer: bytes) -> App:
    """The application, but the first request of a kind has that answer."""
    asked: Counter[str] = Counter()
    headers = [(b"content-type", b"application/protobuf")]

    async def front(scope, receive, send) -> None:
        kind = scope["path"].removeprefix(FLEET)
        asked[kind] += 1
        if kind != what or asked[kind] != 1:
            return await app(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return front


@pytest.fixture
def server(link, key) -> Iterator[Server]:
    one = Server(link, key)
    yield one
    one.fetcher.close()


def test_one_process_answers_message_after_message(link, key, server):
    """It knows its own configuration and the run's options, and outlives jobs that fail."""
    with persistent_node(link, key, "echo", {"index": 7}) as process:
        server.wait_until(online=True)
        for number in range(5):
            server.ask(number=number)
            said = dict(server.answer().content["about"])
            assert said == {"number": number, "index": 7}
        server.ask(error="no such thing")
        failed = server.answer()
        assert failed.has_error() and failed.error.code == 2
        assert failed.error.reason == "ValueError('no such thing')"
        server.ask(number=9)
        assert server.answer().content["about"]["number"] == 9
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        server.wait_until(online=False)


def test_the_answer_to_the_job_under_way_arrives_when_a_client_is_stopped(
    link, key, server, monkeypatch
):
    # Flower's own link tells the server that a client has left in place of its reply; the link of
    # this package does so later (test_lost_answers.py)
    monkeypatch.setattr(link.state, "deactivate_node", lambda node: True)
    with persistent_node(link, key, "echo", {"index": 7}) as process:
        server.wait_until(online=True)
        number, deadline = server.ask(number=1, seconds=2.0), time.monotonic() + 60
        while link.state.object_store.get(number) is not None:  # until the client has read it
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert server.answer().content["about"]["number"] == 1
        assert process.wait(timeout=20) == 0


def test_a_server_that_was_away_gets_the_answers_afterwards(link, key, server):
    """Also to a message that it asked before, and without a word from an operator."""
    with persistent_node(link, key, "echo", {"index": 0}) as process:
        server.wait_until(online=True)
        server.ask(number=1, seconds=2.0)
        time.sleep(1.0)
        link.restart(seconds=3.0)
        assert server.answer().content["about"]["number"] == 1
        server.ask(number=2)
        assert server.answer().content["about"]["number"] == 2
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
    assert log.count("the server does not respond") == 1, "each reason is logged once"
    assert log.count("the server responds again") == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_request_that_fails_once_is_sent_again(link, key, server, status):
    """The guard's 408 for an upload over a slow line, a limit of requests, a fault of Flower."""
    failed: list[str] = []
    link.put_in_front(lambda app: failing_once(app, status, failed))
    with persistent_node(link, key, "echo", {"index": 4}) as process:
        server.wait_until(online=True)
        for number in range(3):
            server.ask(number=number)
            assert server.answer().content["about"]["number"] == number
        assert sorted(failed) == sorted(REPEATED)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_reply_that_is_too_large_is_an_error_of_its_job_and_the_client_goes_on(link, key, server):
    def guarded(app: App) -> App:
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return Guard(app, lambda: {"ann": public}, Record(lambda line: None), most)

    most = 1  # object; a reply with content has more
    link.put_in_front(guarded)
    with persistent_node(link, key, "echo", {"index": 5}) as process:
        server.wait_until(online=True)
        for number in range(2):
            server.ask(number=number)
            failed = server.answer()
            assert failed.has_error() and "a reply has at most 1 objects" in failed.error.reason
        most = 3  # as the reason advises
        assert "with: fedgpt server DIR --reply-objects N" in failed.error.reason
        link.put_in_front(guarded)
        server.ask(number=7)
        assert server.answer().content["about"]["number"] == 7
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read().count("the reply is too large") == 2


def test_a_reply_that_turns_out_to_be_too_large_is_lost_and_the_client_goes_on(link, key, server):
    """The guard may find that only while the reply is uploaded."""
    failed: list[str] = []
    link.put_in_front(lambda app: failing_once(app, 413, failed, ("push-object",)))
    with persistent_node(link, key, "echo", {"index": 6}) as process:
        server.wait_until(online=True)
        server.ask(number=0)
        deadline = time.monotonic() + 90
        while not failed:
            assert time.monotonic() < deadline, "no upload"
            time.sleep(0.05)
        server.ask(number=1)
        assert server.answer().content["about"]["number"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "the last reply was not taken: the server refuses with status 413" in (
            process.stderr.read()
        )


def test_a_client_waits_for_its_server_and_can_be_stopped_while_it_waits(link, key, caplog):
    link.registered(key)
    link.stop()
    node = PersistentNode(FleetConnection(link.address, key, None), ClientApp(), {})
    running = in_thread(node.run)
    time.sleep(1.5)
    assert running.is_alive() and caplog.text.count("the server does not respond") == 1
    node.stop()
    running.join(timeout=10)
    assert not running.is_alive()


def test_a_client_whose_key_is_not_approved_says_so(link, key, monkeypatch, caplog):
    """After a minute, because a restarted client is refused in the same way."""
    monkeypatch.setattr(node_module, "RESTART_SECONDS", 0.5)
    node = PersistentNode(FleetConnection(link.address, key, None), ClientApp(), {})
    with pytest.raises(NotAccepted, match="its key is not approved there, or a client with"):
        node.run()
    assert "may still count an earlier start of this client" in caplog.text


def test_a_client_whose_key_is_revoked_while_it_waits_says_so(link, key):
    identity = link.registered(key)
    with persistent_node(link, key, "echo", {"index": 0}) as process:
        deadline = time.monotonic() + 60
        while link.state.get_node_info(node_ids=[identity])[0].status != "online":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        link.state.delete_node("", identity)
        assert process.wait(timeout=60) == 1
        log = process.stderr.read()
    assert "NotAccepted: the server refuses with status 401" in log


def refusing(app: App, while_true: Callable[[], bool], status: int, detail: str) -> App:
    """The application, but it refuses as long as a condition holds."""
    body = json.dumps({"code": status, "detail": detail}).encode()

    async def front(scope, receive, send) -> None:
        if not while_true():
            return await app(scope, receive, send)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return front


CLOCK = "clock: the node's clock differs from the server's by -3600 s; set its time"


def test_a_clock_that_is_set_does_not_end_a_client(link, key, server):
    """It says once how far the clocks are apart, as the server has it."""
    wrong = threading.Event()
    link.put_in_front(lambda app: refusing(app, wrong.is_set, 401, CLOCK))
    with persistent_node(link, key, "echo", {"index": 3}) as process:
        server.wait_until(online=True)
        wrong.set()
        time.sleep(2.0)  # in which it is refused several times
        assert process.poll() is None
        wrong.clear()
        server.ask(number=3)
        assert server.answer().content["about"]["number"] == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        log = process.stderr.read()
    (told,) = [one for one in log.splitlines() if one.endswith("; trying again")]
    assert f"the server refuses with status 401: {CLOCK}" in told
    assert log.count("the server responds again") == 1


def test_a_clock_that_is_wrong_at_the_start_is_an_error_at_once(link, key):
    link.registered(key)
    link.put_in_front(lambda app: refusing(app, lambda: True, 412, CLOCK))
    node = PersistentNode(FleetConnection(link.address, key, None), ClientApp(), {})
    with pytest.raises(NotAccepted, match="clock differs from the server's by -3600 s"):
        node.run()


@pytest.mark.parametrize("what", REPEATED)
def test_a_refusal_without_a_reason_is_doubted_once(link, key, server, what):
    """As Flower's for a question that waited there while the clock of the server was set."""
    failed: list[str] = []
    link.put_in_front(lambda app: failing_once(app, 401, failed, (what,)))
    with persistent_node(link, key, "echo", {"index": 4}) as process:
        server.wait_until(online=True)
        for number in range(2):
            server.ask(number=number)
            assert server.answer().content["about"]["number"] == number
        assert failed == [what]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_certificate_that_has_ended_is_waited_for_and_one_of_another_server_is_not(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(node_module, "MOST_PAUSE", 0.2)
    server = SiteServer(tmp_path)
    node = PersistentNode(KitConnection(read_kit(server.kit), "127.0.0.1"), ClientApp(), {})
    ended: list[BaseException] = []

    def run() -> None:
        try:
            node.run()
        except NotAccepted as error:
            ended.append(error)

    caplog.set_level(logging.INFO)
    with server.listening():
        running, deadline = in_thread(run), time.monotonic() + 60
        while "connected; waiting for jobs" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    server.certify(days=-400)
    with server.listening():
        while "certificate has expired" not in caplog.text:
            assert running.is_alive() and time.monotonic() < deadline, ended
            time.sleep(0.05)
    server.certify()
    with server.listening():
        while "the server responds again" not in caplog.text:
            assert running.is_alive() and time.monotonic() < deadline, ended
            time.sleep(0.05)
    other = SiteServer(tmp_path / "other")
    for name in ("server.pem", "server.key"):
        (server.folder / name).write_bytes((other.folder / name).read_bytes())
    with server.listening():
        running.join(timeout=60)
    assert len(ended) == 1 and "certificate verify failed" in str(ended[0])


def test_a_client_that_was_killed_is_accepted_again(link, key, server, monkeypatch):
    with persistent_node(link, key, "echo", {"index": 1}) as process:
        server.wait_until(online=True)
        process.kill()
        process.wait()
    with persistent_node(link, key, "echo", {"index": 2}):
        time.sleep(3.0)  # it is refused meanwhile
        link.lose(server.node)  # the minute is over
        server.wait_until(online=False)
        server.wait_until(online=True)
        server.ask(number=1)
        assert server.answer().content["about"]["index"] == 2


def test_a_message_whose_reading_was_interrupted_is_not_lost(link, key, server):
    with persistent_node(link, key, "echo", {"index": 3}):
        server.wait_until(online=True)
        message, send = announced(link, server)
        time.sleep(1.0)  # the client waits for the content
        link.restart(seconds=1.0)
        send()
        deadline = time.monotonic() + 30
        while not (found := link.state.get_message_res({message.object_id}, link.run_id)):
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.1)
        assert found[0].has_content()


def test_a_run_that_ends_before_its_job_was_sent_does_not_end_the_client(link, key, server):
    """As where the server of the run is killed between announcing a job and sending it."""
    with persistent_node(link, key, "echo", {"index": 0}) as process:
        server.wait_until(online=True)
        announced(link, server)
        time.sleep(2.0)  # the client waits for the content
        server.fetcher.close()
        link.state.stop_run(link.run_id)
        time.sleep(2.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "a job was not read: the server refuses with status 403" in process.stderr.read()


def test_the_end_of_a_run_does_not_end_the_client(link, key, server):
    with persistent_node(link, key, "echo", {"index": 0}) as process:
        server.wait_until(online=True)
        server.ask(number=1, seconds=1.5)
        time.sleep(1.0)
        server.fetcher.close()
        link.state.stop_run(link.run_id)
        time.sleep(2.0)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "the last reply was not taken" in process.stderr.read()


def test_a_message_that_cannot_be_read_is_an_error_of_its_job_and_the_client_goes_on(
    link, key, server
):
    """The server hears at once that, and not what, could not be read."""
    rubbish = PullObjectResponse(object_found=True, object_available=True, object_content=b"secret")
    link.put_in_front(lambda app: damaging(app, "pull-object", rubbish.SerializeToString()))
    with persistent_node(link, key, "echo", {"index": 5}) as process:
        server.wait_until(online=True)
        server.ask(number=1)
        failed = server.answer(seconds=20)
        assert failed.has_error() and failed.error.code == 2
        assert re.fullmatch(r"the message cannot be read \(\w+\)", failed.error.reason)
        server.ask(number=2)
        assert server.answer().content["about"]["number"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        log = process.stderr.read()
        assert "a message was not read: the message cannot be read (" in log
        assert "secret" not in log


def test_an_answer_that_names_no_message_does_not_end_the_client(link, key, server):
    link.put_in_front(lambda app: damaging(app, "pull-messages", b"\xff rubbish"))
    with persistent_node(link, key, "echo", {"index": 5}) as process:
        server.wait_until(online=True)
        server.ask(number=2)
        assert server.answer().content["about"]["number"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "the server's answer cannot be read (ValueError)" in process.stderr.read()


def test_a_message_beyond_the_memory_of_a_site_is_an_error_and_the_client_goes_on(
    link, key, server
):
    """The limit is as that of `memory` in a policy; the message has less than all of it."""
    with persistent_node(link, key, "echo", {"index": 6}) as process:
        server.wait_until(online=True)
        server.ask(number=0)
        assert server.answer().content["about"]["number"] == 0
        status = Path(f"/proc/{process.pid}/status").read_text()
        used = int(status.partition("VmData:")[2].split()[0]) * 1024
        limit = used + 40 * 2**20
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        server.ask(np.arange(16 * CHUNK // 8), number=1)
        failed = server.answer()
        assert failed.has_error() and failed.error.code == 2
        assert failed.error.reason == connection_module.NO_ROOM
        advises(
            failed.error.reason,
            "lower model.n_layer or model.n_embd, or raise memory in the site's policy",
        )
        server.ask(number=2)
        assert server.answer().content["about"]["number"] == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "a message was not read: out of memory" in process.stderr.read()


@pytest.mark.parametrize("more", [0, 1])
def test_a_message_that_is_too_large_by_its_tree_is_refused_before_any_of_it_is_read(
    link, key, server, monkeypatch, more
):
    """The server that still sends it is not disturbed."""
    most = 3
    monkeypatch.setattr(connection_module, "_most_memory", lambda: most * CHUNK)
    _, connection = link.node(key)
    # 5 objects are no chunks, and one more chunk has the rest after the head of the array
    _, send = announced(link, server, most + OTHER_OBJECTS - 6 + more)
    if not more:
        send()
        assert next_message(connection).has_content()
        return
    refused = next_message(connection)
    assert refused.has_error() and refused.error.reason == connection_module.NO_ROOM
    send()
    assert connection.receive() is None


def test_the_memory_for_messages_is_the_machines_or_the_share_of_the_site(monkeypatch):
    monkeypatch.setattr(connection_module, "memory", lambda: 1000)
    limits = {"RLIMIT_DATA": -1}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits["RLIMIT_DATA"], -1))
    assert connection_module._most_memory() == 1000
    limits["RLIMIT_DATA"] = 600
    assert connection_module._most_memory() == 600
    monkeypatch.setattr(connection_module, "memory", lambda: 0)
    assert connection_module._most_memory() == 600
    limits["RLIMIT_DATA"] = -1
    assert connection_module._most_memory() == 0


def test_stopping_takes_no_lock_which_the_interrupted_code_may_hold(link, key):
    """A signal's handler runs in the middle of whatever the node does."""
    node, called = PersistentNode(FleetConnection(link.address, key, None), ClientApp(), {}), []
    sys.setprofile(lambda frame, event, what: called.append(repr(what)))
    node.stop()
    sys.setprofile(None)
    assert called and not [one for one in called if "lock" in one]
    node.run()  # it returns at once


def test_heartbeats_go_on_after_any_error_which_the_log_has_once_each_time(monkeypatch, caplog):
    monkeypatch.setattr(node_module, "HEARTBEAT_SECONDS", 0.01)
    over = threading.Event()

    class Fails:
        beats = 0

        def heartbeat(self) -> bool:
            self.beats += 1
            if self.beats == 10:
                over.set()
            if self.beats in (4, 5):
                return True
            raise RuntimeError("no more threads")

    with caplog.at_level(logging.WARNING), _Heartbeats(Fails()):  # type: ignore[arg-type]
        assert over.wait(10)
    assert caplog.text.count("a heartbeat failed (RuntimeError); trying again") == 2
