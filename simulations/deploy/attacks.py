"""Attacks on a server's port from the network, as a stranger or with the kit of a site.

    python simulations/deploy/attacks.py HOST PORT CA stranger|bodies|silence|site

prints a line of JSON for each: what was tried, and how it was answered. A site attacks with its
`--kit`, and the `--ids` of a job of another site, which it would have to guess.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from flwr.proto.control_pb2 import RegisterNodeRequest as ControlRegisterNodeRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from google.protobuf.message import Message

from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.doctor import KitConnection
from fedgpt.flower.deploy.kit import read_kit

MEGABYTE = bytes(1 << 20)
SIZES = (300, 1024)  # MB of the bodies without credentials
SILENT = 200  # half-open connections
SILENT_SECONDS = 60.0  # for which it is watched how they end
TYPE = {"content-type": "application/protobuf"}


@dataclass(frozen=True)
class Target:
    """The port of a server, and the certificate of its CA."""

    host: str
    port: int
    ca: Path

    def ask(self, path: str, message: Message | None = None) -> str:
        """The answer to a request without credentials: its status, and what it says."""
        url = f"https://{self.host}:{self.port}{path}"
        content = None if message is None else message.SerializeToString()
        with httpx.Client(verify=self.context(), timeout=30, trust_env=False) as client:
            method = "GET" if content is None else "POST"
            return told(client.request(method, url, content=content, headers=TYPE))

    def context(self) -> ssl.SSLContext:
        """Accepts the server's certificate only."""
        return ssl.create_default_context(cafile=str(self.ca))

    def connect(self) -> socket.socket:
        """A TCP connection, without a word of TLS."""
        return socket.create_connection((self.host, self.port), timeout=30)

    def secure(self) -> ssl.SSLSocket:
        """A connection with TLS."""
        return self.context().wrap_socket(self.connect(), server_hostname=self.host)


def told(answer: httpx.Response) -> str:
    """The status of an answer, and its reason if it has one."""
    with suppress(ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.json()['detail'].partition(':')[0]}"
    return str(answer.status_code)


def by_a_stranger(target: Target) -> Iterator[tuple[str, str]]:
    """(attack, answer) of what needs no key."""
    own = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    control, runtime, fleet = "/v1/control/", "/v1/runtime/", "/v1/fleet/"
    yield "list the runs", target.ask(f"{control}list-runs", ListRunsRequest())
    yield "list the nodes", target.ask(f"{control}list-nodes", ListNodesRequest())
    register = ControlRegisterNodeRequest(public_key=own)
    yield "register a key at control", target.ask(f"{control}register-node", register)
    yield "start a run of own code", target.ask(f"{control}start-run", StartRunRequest())
    task = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    yield "take the server's task", target.ask(f"{runtime}acquire-task", task)
    for path in ("/docs", "/openapi.json", "/health"):
        yield f"read {path}", target.ask(path)
    for spelling in (f"{fleet}../control/list-runs", f"/{control}list-runs"):
        yield f"read {spelling}", target.ask(spelling, ListRunsRequest())
    register = RegisterNodeFleetRequest(public_key=own)
    yield "register a key as a node", target.ask(f"{fleet}register-node", register)
    yield "poll without a signature", target.ask(f"{fleet}pull-messages", PullMessagesRequest())
    stranger = FleetConnection(
        f"{target.host}:{target.port}",
        ec.generate_private_key(ec.SECP384R1()),
        target.ca.read_bytes(),
    )
    yield "connect with an unknown key", refused(stranger.activate)


def of_bodies(target: Target) -> Iterator[tuple[str, str]]:
    """(attack, answer) of large bodies without credentials."""
    for size in SIZES:
        for chunked in (False, True):
            kind = "chunked" if chunked else "with its length"
            yield f"a body of {size} MB, {kind}", _body(target, size, chunked)


def _body(target: Target, megabytes: int, chunked: bool) -> str:
    head = "transfer-encoding: chunked" if chunked else f"content-length: {megabytes << 20}"
    piece = b"%x\r\n%s\r\n" % (len(MEGABYTE), MEGABYTE) if chunked else MEGABYTE
    sent, answer = 0, b""
    with target.secure() as one:
        one.sendall(
            f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{head}\r\n"
            f"content-type: {TYPE['content-type']}\r\n\r\n".encode()
        )
        with suppress(OSError):
            while sent < megabytes:
                one.sendall(piece)
                sent += 1
        with suppress(OSError):
            answer = one.recv(4096)
    status = answer.split()[1].decode() if answer else "closed"
    return f"{status} after {sent} MB"


def of_silence(target: Target, site: FleetConnection) -> Iterator[tuple[str, str]]:
    """(attack, answer) of connections that say nothing, while `site` goes on polling."""
    with ExitStack() as stack:
        waiting, slowest, began = [], 0.0, time.monotonic()
        for number in range(SILENT):  # a quarter each: TCP, half of TLS, TLS, half a request
            with suppress(OSError):
                one = target.secure() if number % 4 >= 2 else target.connect()
                stack.callback(one.close)
                waiting.append(one)
                if number % 4 in (1, 3):
                    one.sendall(b"\x16\x03\x01\x02" if number % 4 == 1 else b"POST /v1/fleet/pull-")
        while time.monotonic() - began < SILENT_SECONDS and not all(map(_ended, waiting)):
            asked = time.monotonic()
            site.heartbeat()
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.2)
        seconds = time.monotonic() - began
    ends = f"{len(waiting)} connected, all ended after {seconds:.1f} s"
    yield f"{SILENT} half-open connections", f"{ends}; slowest heartbeat {slowest:.2f} s"


def _ended(one: socket.socket) -> bool:
    one.settimeout(0.001)
    try:
        while one.recv(4096):
            pass
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    except OSError:
        pass
    return True


def by_a_site(site: FleetConnection, node: int, message: str) -> Iterator[tuple[str, str]]:
    """(attack, answer) of what a site tries on the job `message` of another one, `node`."""
    client, own = site._client, site._node
    for name, digest in (("with its digest", message), ("with another digest", "0" * 64)):
        forged = PushMessagesRequest(node=own, message_object_trees=[ObjectTree(object_id=digest)])
        metadata = forged.messages_list.add().metadata
        metadata.src_node_id, metadata.dst_node_id, metadata.message_id = node, 1, digest
        metadata.reply_to_message_id = message
        yield f"a reply as another site, {name}", refused(lambda f=forged: client.PushMessages(f))
    as_other = PullMessagesRequest(node=Node(node_id=node))
    yield "poll as another site", refused(lambda: client.PullMessages(as_other))
    pull = PullObjectRequest(node=own, object_id=message)
    yield "read another site's job", refused(lambda: client.PullObject(pull))
    confirm = ConfirmMessageReceivedRequest(node=own, message_object_id=message)
    yield "confirm another site's job", refused(lambda: client.ConfirmMessageReceived(confirm))
    other = ActivateNodeRequest(
        public_key=public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key()),
        heartbeat_interval=30,
    )
    yield (
        "connect with another key than that of the request",
        refused(lambda: client.ActivateNode(other)),
    )


def refused(request: object) -> str:
    """How a request was refused: its status and reason; "accepted" if it was not."""
    assert callable(request)
    try:
        request()
    except httpx.HTTPStatusError as error:
        return told(error.response)
    return "accepted"


def _connected(
    site: FleetConnection, attacks: Iterator[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """The attacks of a site that is connected meanwhile, so that its client may be afterwards."""
    site.activate()
    try:
        yield from attacks
    finally:
        site.deactivate()


def main() -> int:
    """Attack, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("ca", type=Path)
    parser.add_argument("what", choices=["stranger", "bodies", "silence", "site"])
    parser.add_argument("--kit", help="of the site that attacks")
    parser.add_argument("--ids", type=json.loads, help="node and message of another site's job")
    chosen = parser.parse_args()
    target = Target(chosen.host, chosen.port, chosen.ca)
    if chosen.what in ("stranger", "bodies"):
        found = (by_a_stranger if chosen.what == "stranger" else of_bodies)(target)
    else:
        kit = read_kit(chosen.kit)
        site = KitConnection(kit, chosen.host)
        found = _connected(
            site,
            of_silence(target, site)
            if chosen.what == "silence"
            else by_a_site(site, chosen.ids["node"], chosen.ids["message"]),
        )
    for attack, answer in found:
        print(json.dumps([attack, answer]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
