"""The open port over real sockets and TLS, around the real SuperLink app."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from support.link import PROTOBUF, Fleet, Site, free_port, server_folder, write_certificates
from support.world import wait_until
from uvicorn.loops.auto import auto_loop_factory

from fedgpt.flower.deploy import connections, listener
from fedgpt.flower.deploy.guard import Guard
from fedgpt.flower.deploy.limits import REFUSALS, Record

PULL = "/v1/fleet/pull-messages"


class Port:
    """A listener that runs in a thread."""

    def __init__(self, fleet: Fleet, folder: Path):
        self.fleet, self.folder = fleet, folder
        self.lines: list[dict] = []
        self.guard = Guard(fleet.app, lambda: fleet.approved, Record(self.lines.append), 64)
        self._loop = auto_loop_factory()()  # as the link's
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        files = str(folder / "server.pem"), str(folder / "server.key")
        self.listener = listener.Listener(self.guard, files, {})
        self._run(self.listener.start("127.0.0.1", 0))
        self.port = self.listener.port

    def _run(self, work) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    def stop(self) -> None:
        self._run(self.listener.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "ca.pem"))

    def plain(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def secure(self) -> ssl.SSLSocket:
        return self.context().wrap_socket(self.plain(), server_hostname="127.0.0.1")

    def client(self) -> httpx.Client:
        return httpx.Client(verify=self.context(), base_url=f"https://127.0.0.1:{self.port}")

    def pull(self, client: httpx.Client, site: Site) -> int:
        body = PullMessagesRequest(node=self.fleet.of(site)).SerializeToString()
        headers = {"content-type": PROTOBUF.decode(), **site.headers()}
        return client.post(PULL, content=body, headers=headers).status_code

    def reasons(self) -> list[str]:
        return [line["reason"] for line in self.lines]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    folder = tmp_path_factory.mktemp("server")
    fleet = Fleet(folder)
    server_folder(folder, fleet.sites)
    for site in fleet.sites:
        fleet.activate(site)
    return fleet


@pytest.fixture
def port(fleet, tmp_path) -> Iterator[Port]:
    server_folder(tmp_path, fleet.sites)
    port = Port(fleet, tmp_path)
    yield port
    port.stop()


@pytest.fixture
def quick(monkeypatch) -> None:
    """Times of the listener, a twentieth of what they are."""
    for name in ("TLS_SECONDS", "REQUEST_SECONDS", "KEEP_ALIVE_SECONDS"):
        monkeypatch.setattr(listener, name, getattr(listener, name) / 20)


def ended(one: socket.socket, seconds: float) -> bool:
    """Whether the server ends a connection within some seconds; what it says is dropped."""
    one.settimeout(seconds)
    try:
        while one.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def request(length: int | None, *more: str) -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [f"POST {PULL} HTTP/1.1", "host: x", size, "content-type: application/protobuf", *more]
    return "\r\n".join([*lines, "", ""]).encode()


def test_nodes_are_served_and_keep_their_connection(port):
    north, south = port.fleet.sites
    with port.client() as client:
        assert [port.pull(client, site) for site in (north, south, north)] == [200] * 3
    assert port.lines == []


def test_a_request_without_tls_is_told_so(port):
    for plain in (b"POST /v1/fleet/register-node HTTP/1.1\r\n\r\n", b"\x00\x01", b"SSH-2.0-x\r\n"):
        with port.plain() as one:
            one.sendall(plain)
            assert b"this port speaks TLS" in one.recv(1000)
            assert ended(one, 5)
    assert port.reasons() == ["plaintext"] * 3


def test_who_trusts_another_ca_ends_the_handshake_and_it_is_recorded(port, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write_certificates(other, ["127.0.0.1"])
    context = ssl.create_default_context(cafile=str(other / "ca.pem"))
    with pytest.raises(ssl.SSLCertVerificationError), port.plain() as one:
        context.wrap_socket(one, server_hostname="127.0.0.1")
    deadline = time.monotonic() + 5
    while not port.lines and time.monotonic() < deadline:
        time.sleep(0.01)
    assert port.reasons() == ["tls"] and "ALERT" in port.lines[0]["detail"]


@contextmanager
def silent_connections(port: Port, count: int) -> Iterator[list[socket.socket]]:
    """A quarter each: only connected, half a handshake, TLS and no more, half a request."""
    with ExitStack() as stack:
        found = []
        for number in range(count):
            one = port.secure() if number % 4 >= 2 else port.plain()
            stack.callback(one.close)
            if number % 4 == 1:
                one.sendall(b"\x16\x03\x01\x02")
            elif number % 4 == 3:
                one.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost:")
            found.append(one)
        yield found


def test_who_connects_and_says_nothing_is_ended_while_nodes_are_served(quick, port, monkeypatch):
    monkeypatch.setattr(connections, "STRANGERS_AT_ADDRESS", 1000)
    north, _ = port.fleet.sites
    with port.client() as client, silent_connections(port, 40) as silent:
        deadline = time.monotonic() + 5 * listener.TLS_SECONDS
        for one in silent:
            assert port.pull(client, north) == 200
            assert ended(one, max(0.0, deadline - time.monotonic()))
    assert set(port.reasons()) <= {"tls", "no_request"}


def test_a_request_that_comes_byte_by_byte_is_ended(quick, port):
    north, _ = port.fleet.sites
    signed = [f"{name}: {value}" for name, value in north.headers().items()]
    first, slow = request(2, *signed) + b"\x0a\x00", request(2, "x: " + "a" * 1000)
    for before in (b"", first):  # from the start, and after a request of a node
        with port.secure() as one:
            one.sendall(before)
            begin = time.monotonic()
            with pytest.raises(OSError):
                for byte in slow:
                    one.sendall(bytes([byte]))
                    time.sleep(0.01)
            assert time.monotonic() - begin < 5


def test_a_stranger_makes_room_and_a_node_does_not(port):
    north, _ = port.fleet.sites
    with port.client() as client, ExitStack() as stack:
        assert port.pull(client, north) == 200
        most = connections.STRANGERS_AT_ADDRESS
        waiting = [stack.enter_context(port.plain()) for _ in range(most + 5)]
        assert all(ended(one, 5) for one in waiting[:5])
        assert not ended(waiting[5], 0.1)
        assert port.pull(client, north) == 200
        assert len(port.listener._places.every()) == most + 1
    assert port.guard.record.counts["connections"] == 5


def test_an_ended_stranger_gets_a_reset_because_a_stock_node_does_not_retry_an_end_of_file(port):
    with ExitStack() as stack:
        first = stack.enter_context(port.plain())
        for _ in range(connections.STRANGERS_AT_ADDRESS):
            stack.enter_context(port.plain())
        with pytest.raises(ConnectionResetError):
            first.recv(1)


def test_a_node_has_a_number_of_connections(port):
    north, south = port.fleet.sites
    with ExitStack() as stack:
        most = connections.OF_NODE
        clients = [stack.enter_context(port.client()) for _ in range(most + 3)]
        assert [port.pull(one, north) for one in clients] == [200] * most + [503] * 3
        assert port.pull(stack.enter_context(port.client()), south) == 200
        assert [port.pull(one, north) for one in clients[:most]] == [200] * most
        clients[0].close()
        wait_until(lambda: len(port.listener._places.every()) == most)
        assert port.pull(clients[-1], north) == 200
    assert port.reasons() == ["connections"] * 3


def test_an_address_that_is_refused_too_often_is_not_let_in_unless_a_node_calls_from_it(port):
    north, _ = port.fleet.sites
    for _ in range(REFUSALS):
        port.guard.addresses.refused("127.0.0.1")
    with pytest.raises(ConnectionResetError), port.plain() as one:
        one.recv(1)
    assert port.guard.record.counts["barred"] == 1
    port.guard.addresses.known("127.0.0.1")
    with port.client() as client:
        assert port.pull(client, north) == 200


GARBAGE = {
    "no http": b"\x00\x01\x02 garbage\r\n\r\n",
    "two lengths": request(5, "content-length: 6") + b"12345",
    "a length that is no number": request(5).replace(b": 5", b": x"),
    "headers without an end": request(0)[:-2] + b"x: " + b"a" * 40_000,
    "many headers": request(0)[:-2] + b"".join(b"x%d: a\r\n" % n for n in range(5000)),
    "a chunk that is none": request(None) + b"zz\r\n",
    "a body that is longer": request(1) + b"12345",
    "a line that goes on": request(0, "x: a\r\n b"),
    "another protocol": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a websocket": request(0, "connection: upgrade", "upgrade: websocket"),
}


@pytest.mark.parametrize("case", GARBAGE)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_no_request_is_refused_without_a_word_in_the_log(port, case, known, caplog):
    caplog.set_level(logging.WARNING)
    north, _ = port.fleet.sites
    lines = "".join(f"{name}: {value}\r\n" for name, value in north.headers().items()).encode()
    data = GARBAGE[case]
    if known:
        data = data.replace(b"content-type", lines + b"content-type", 1)
    with port.secure() as one:
        one.sendall(data)
        one.settimeout(5)
        answer = one.recv(4096)
        assert answer.startswith(b"HTTP/1.1 4") or (known and answer.startswith(b"HTTP/1.1 2"))
    with port.client() as client:
        assert port.pull(client, north) == 200
    assert [r for r in caplog.records if r.name != "flwr"] == []


def resident() -> int:
    """Resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20


@pytest.mark.parametrize(
    "megabytes, chunked", [(300, False), (1024, False), (300, True), (1024, True)]
)
def test_a_large_body_without_credentials_costs_nothing(port, monkeypatch, megabytes, chunked):
    """The connection ends with the answer; what comes until then is discarded."""
    monkeypatch.setattr(listener, "ANSWER_SECONDS", 0.0)
    before, sent, piece = resident(), 0, bytes(1 << 20)
    size = None if chunked else megabytes << 20
    path = b"/v1/fleet/push-object"
    with port.secure() as one:
        one.settimeout(20)
        one.sendall(request(size).replace(PULL.encode(), path))
        deadline = time.monotonic() + 20
        with pytest.raises(OSError):
            while time.monotonic() < deadline:
                one.sendall((b"%x\r\n" % len(piece) + piece + b"\r\n") if chunked else piece)
                sent += 1
    assert sent < 300 and resident() - before < 50
    assert port.reasons() == ["no_credentials" if chunked else "too_large"]


def test_a_refused_request_is_answered_before_its_body_is_sent(port):
    with port.secure() as one:
        one.sendall(request(1 << 30))
        assert one.recv(4096).startswith(b"HTTP/1.1 413")
        assert ended(one, 5)


def test_a_slow_reader_gets_its_whole_object(quick, port):
    """The response is longer in coming than a connection may be idle."""
    north, _ = port.fleet.sites
    job = port.fleet.job(north, np.random.default_rng(1).random(640_000))
    with port.client() as client:
        body = PullMessagesRequest(node=port.fleet.of(north)).SerializeToString()
        headers = {"content-type": PROTOBUF.decode(), **north.headers()}
        pulled = client.post(PULL, content=body, headers=headers).content
        assert PullMessagesResponse.FromString(pulled).messages_list
    objects = {key: one.deflate() for key, one in get_all_nested_objects(job).items()}
    key = max(objects, key=lambda key: len(objects[key]))
    asked = PullObjectRequest(node=port.fleet.of(north), run_id=port.fleet.run_id, object_id=key)
    content, got = asked.SerializeToString(), bytearray()
    lines = [f"{name}: {value}" for name, value in north.headers().items()]
    with port.secure() as one:
        head = request(len(content), *lines).replace(b"pull-messages", b"pull-object")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        one.sendall(head + content)
        begin = time.monotonic()
        while len(got) < len(objects[key]):
            piece = one.recv(1 << 14)
            assert piece, f"ended after {len(got)} bytes"
            got += piece
            if time.monotonic() - begin < 2.5:
                time.sleep(0.1)
    answer = PullObjectResponse.FromString(bytes(got).partition(b"\r\n\r\n")[2])
    assert answer.object_content == objects[key]


def test_a_new_certificate_is_used_at_once_and_a_wrong_pair_is_not(port, tmp_path):
    old, north = (port.folder / "ca.pem").read_bytes(), port.fleet.sites[0]
    write_certificates(port.folder, ["127.0.0.1"])
    (port.folder / "server.key").write_bytes(b"no key")
    with pytest.raises(ssl.SSLError):
        port.listener.load_certificate()
    new = (port.folder / "ca.pem").read_bytes()
    (port.folder / "ca.pem").write_bytes(old)
    with port.client() as client:
        assert port.pull(client, north) == 200
    write_certificates(port.folder, ["127.0.0.1"])
    port.listener.load_certificate()
    with port.client() as client:
        assert port.pull(client, north) == 200
    assert new != (port.folder / "ca.pem").read_bytes()


def test_a_port_in_use_is_an_error_and_all_addresses_are_served(fleet, tmp_path):
    server_folder(tmp_path, fleet.sites)
    files = str(tmp_path / "server.pem"), str(tmp_path / "server.key")
    one = listener.Listener(Guard(fleet.app, dict, Record(print), 64), files, {})
    number = free_port()

    async def work() -> None:
        await one.start(None, number)
        with pytest.raises(OSError, match="in use"):
            await listener.Listener(one._config.app, files, {}).start("127.0.0.1", number)
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            if family == socket.AF_INET6 and not socket.has_ipv6:
                continue
            with socket.socket(family) as peer:
                await asyncio.to_thread(peer.connect, (address, number))
                while not one._places.every():
                    await asyncio.sleep(0.01)
            while one._places.every():
                await asyncio.sleep(0.01)
        await one.stop()

    asyncio.run(work())
