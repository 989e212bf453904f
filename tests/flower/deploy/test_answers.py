"""A hostile server's answers: none takes memory of a site, none leads it elsewhere."""

from __future__ import annotations

import bz2
import gzip
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeResponse, PullMessagesResponse
from flwr.supercore.error import ApiErrorCode
from support.link import free_port
from support.site_server import raw_server

from fedgpt.flower.deploy.answers import MOST
from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.node import reason_of

KEY = ec.generate_private_key(ec.SECP384R1())
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/protobuf\r\n"
EMPTY = PullMessagesResponse().SerializeToString()
Serve = Callable[[socket.socket], object]


def request_of(one: socket.socket) -> bytes:
    """A request with its body; nothing where there is none."""
    found, wanted = b"", 1
    while len(found) < wanted and (more := one.recv(1 << 16)):
        found += more
        head, end, _ = found.lower().partition(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]) if end else 0
        wanted = len(head) + 4 + length if end else len(found) + 1
    return found


def answered(head: bytes, body: bytes, seen: list[bytes] | None = None) -> Serve:
    """A server that answers each request with these bytes."""

    def serve(one: socket.socket) -> None:
        while request := request_of(one):
            if seen is not None:
                seen.append(request)
            one.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)

    return serve


def without_end(head: bytes, piece: bytes) -> Serve:
    """A server whose answer goes on until the client closes the connection."""

    def serve(one: socket.socket) -> None:
        one.recv(1 << 16)
        one.sendall(head)
        while True:
            one.sendall(piece * 500)

    return serve


@contextmanager
def connected(serve: Serve) -> Iterator[FleetConnection]:
    port = free_port()
    with raw_server(port, serve):
        connection = FleetConnection(f"127.0.0.1:{port}", KEY, None)
        try:
            yield connection
        finally:
            connection.close()


REQUESTS: dict[str, Callable[[FleetConnection], object]] = {
    "activate-node": FleetConnection.activate,
    "pull-messages": FleetConnection.receive,
    "send-node-heartbeat": FleetConnection.heartbeat,
    "get-run": lambda connection: connection.run_config(1),
    "deactivate-node": FleetConnection.deactivate,
}
ZEROS = gzip.compress(bytes(1 << 26), 9)


@pytest.mark.parametrize("what", REQUESTS)
def test_a_compressed_answer_is_not_asked_for_and_not_unpacked(what):
    seen: list[bytes] = []
    with (
        connected(answered(HEAD + b"content-encoding: gzip\r\n", ZEROS, seen)) as connection,
        pytest.raises(httpx.RemoteProtocolError, match=f"answer to {what} is compressed"),
    ):
        REQUESTS[what](connection)
    assert b"\r\naccept-encoding: identity\r\n" in seen[0].lower()


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.parametrize("length", ["content-length: 99999999999\r\n", "chunked", "neither"])
def test_an_answer_has_no_more_bytes_than_its_kind_may_have(what, length):
    head, piece = HEAD + length.encode() + b"\r\n", b"x" * 99
    if length == "neither":
        head = HEAD + b"connection: close\r\n\r\n"
    if length == "chunked":
        head, piece = CHUNKED, b"2\r\nxx\r\n"
    with (
        connected(without_end(head, piece)) as connection,
        pytest.raises(httpx.RemoteProtocolError, match=f"answer to {what} has more than .* bytes"),
    ):
        REQUESTS[what](connection)


@pytest.mark.parametrize("piece", [b"x: y\r\n", b"x", b"set-cookie: a=b\r\n"])
def test_headers_without_an_end_are_not_read_to_it(piece):
    with (
        connected(without_end(HEAD, piece)) as connection,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        connection.receive()


def test_trailers_without_an_end_are_not_read_to_it():
    with (
        connected(without_end(CHUNKED + b"0\r\n", b"x: y\r\n")) as connection,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        connection.receive()


def test_an_answer_as_large_as_it_may_be_is_read():
    node = ActivateNodeResponse(node_id=7).SerializeToString()
    filled = node + b"\x7a" + b"\xfa\xff\x03" + bytes(MOST - len(node) - 4)  # of a later version
    assert len(filled) == MOST
    with connected(answered(HEAD, filled)) as connection:
        assert connection.activate() == 7
    with (
        connected(answered(HEAD, filled + b"\0")) as connection,
        pytest.raises(httpx.RemoteProtocolError, match="more than 65,536 bytes"),
    ):
        connection.activate()


def test_a_redirection_is_not_followed():
    elsewhere: list[bytes] = []
    port = free_port()
    head = b"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:%d/v1/fleet/pull-messages\r\n" % port
    with (
        raw_server(port, answered(HEAD, EMPTY, elsewhere)),
        connected(answered(head, b"")) as connection,
        pytest.raises(httpx.HTTPStatusError, match="307"),
    ):
        connection.receive()
    assert not elsewhere


def test_cookies_are_not_kept():
    seen: list[bytes] = []
    with connected(answered(HEAD + b"set-cookie: a=b\r\n", EMPTY, seen)) as connection:
        connection.receive()
        connection.receive()
    assert len(seen) == 2 and b"cookie" not in seen[1].lower()


def test_the_reason_of_a_refusal_is_one_line_and_not_unpacked():
    bomb = bz2.compress(bytes(1 << 24))
    head = b"HTTP/1.1 400 No\r\ncontent-type: text/plain; charset=bz2\r\n"
    detail = json.dumps({"code": 400, "detail": "no\nINFO all is well \x1b[2J" + "x" * 9999})
    for body, told in [
        (bomb, "the server refuses with status 400"),
        (detail.encode(), "the server refuses with status 400: no INFO all is well [2J" + "x" * 9),
    ]:
        with (
            connected(answered(head, body)) as connection,
            pytest.raises(httpx.HTTPStatusError) as refused,
        ):
            connection.receive()
        reason = reason_of(refused.value)
        assert reason.startswith(told) and reason.isprintable() and len(reason) <= 500


def test_what_a_server_says_of_versions_is_not_printed_and_ends_no_process(caplog):
    code = int(ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE)
    body = json.dumps({"code": code, "detail": "other\x1b[2J versions"}).encode()
    head = b"HTTP/1.1 412 No\r\nflwr-version-incompatibility-message: \x1b[2J\r\n"
    with (
        connected(answered(head, body)) as connection,
        pytest.raises(httpx.HTTPStatusError) as refused,
    ):
        connection.receive()
    assert reason_of(refused.value).endswith("412: other [2J versions")
    assert "\x1b" not in caplog.text
