"""A server's folder with certificates and sites, and requests to the real SuperLink app behind its
guard: in this process, without a network.
"""

from __future__ import annotations

import asyncio
import json
import socket
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import Message as Proto

from fedgpt.flower.deploy import inner
from fedgpt.flower.deploy.guard import PATHS, Guard
from fedgpt.flower.deploy.limits import Record
from fedgpt.flower.deploy.registration import register
from fedgpt.flower.deploy.waiting import Bell

PROTOBUF = b"application/protobuf"


@dataclass
class Site:
    """A site and its private key."""

    name: str
    private: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP384R1())
    )

    @property
    def public(self) -> bytes:
        return public_key_to_bytes(self.private.public_key())

    def headers(self, at: datetime | None = None) -> dict[str, str]:
        """The headers with which Flower signs a request."""
        time = (at or datetime.now(UTC)).isoformat()
        signature = sign_message(self.private, time.encode())
        return {
            "flwr-public-key": b64encode(self.public).decode(),
            "flwr-signature": b64encode(signature).decode(),
            "flwr-timestamp": time,
        }

    def write(self, path: Path) -> Path:
        """Its private key as `flower-supernode` reads it."""
        path.write_bytes(
            self.private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.OpenSSH,
                serialization.NoEncryption(),
            )
        )
        path.chmod(0o600)
        return path


def server_folder(
    folder: Path, sites: Iterable[Site], names: Iterable[str] = ("127.0.0.1",)
) -> int:
    """Write a server's folder as `fedgpt keys init` and `approve` do; its port."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    write_certificates(folder, names)
    port = free_port()
    (folder / "server.json").write_text(
        json.dumps({"format": 1, "hosts": list(names), "port": port})
    )
    write_sites(folder, sites)
    return port


def write_sites(folder: Path, sites: Iterable[Site], revoked: Iterable[Site] = ()) -> None:
    """Replace the list of sites."""
    now = datetime.now(UTC).isoformat()
    entry = {
        site.name: {"public_key": site.public.decode(), "approved": now, "revoked": None}
        for site in sites
    }
    entry |= {
        site.name: {"public_key": site.public.decode(), "approved": now, "revoked": now}
        for site in revoked
    }
    beside = folder / "sites.json.new"
    beside.write_text(json.dumps({"format": 1, "sites": entry}))
    beside.chmod(0o600)
    beside.replace(folder / "sites.json")


def write_certificates(folder: Path, names: Iterable[str]) -> None:
    """ca.pem, and server.pem with server.key, valid for `names`."""
    ca, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate("fedgpt test CA", ca, "fedgpt test CA", ca, None)
    own = _certificate(next(iter(names)), key, "fedgpt test CA", ca, names)
    (folder / "ca.pem").write_bytes(root)
    (folder / "server.pem").write_bytes(own)
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "server.key").chmod(0o600)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    hosts: Iterable[str] | None,
) -> bytes:
    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=hosts is None, path_length=None), critical=True)
    )
    if hosts is not None:
        alternatives = [x509.IPAddress(ip_address(host)) for host in hosts]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    signed = builder.sign(signer, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes
    read: int  # bytes of the request that were taken

    @property
    def detail(self) -> str:
        return json.loads(self.body)["detail"]

    @property
    def reason(self) -> str:
        return self.detail.partition(":")[0]


class Fleet:
    """The real SuperLink app behind the guard, two approved sites, and one run."""

    def __init__(self, folder: Path, reply_objects: int = 64):
        self.sites = [Site("north"), Site("south")]
        self.approved = {site.name: site.public for site in self.sites}
        self.bell = Bell()
        self.app = inner.flower_app(folder, b"secret", self.bell)
        self.state = self.app.state.linkstate_factory.state()
        register(self.state, self.approved)
        self.lines: list[dict[str, Any]] = []
        self.guard = Guard(
            inner.without_control(self.app),
            lambda: self.approved,
            Record(self.lines.append),
            reply_objects,
        )
        self.run_id, self.task = self._run()

    def _run(self, claim: bool = True) -> tuple[int, int]:
        fab_hash = self.state.store_fab(Fab(None, b"code", {}))
        run_id = self.state.create_run(
            "a/b", "1", fab_hash, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP
        )
        task = self.state.get_run_info(run_ids=[run_id])[0].primary_task_id
        assert task is not None
        if not claim:
            return run_id, task
        assert self.state.claim_task(task) and self.state.activate_task(task)
        TaskIdentity.run_id, TaskIdentity.task_id = run_id, task
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        return run_id, task

    def node(self, site: Site) -> int:
        found = self.state.get_node_id_by_public_key(site.public)
        assert found is not None
        return found

    def ask(
        self,
        what: str,
        request: Proto | bytes,
        site: Site | None,
        *,
        headers: dict[str, str] | None = None,
        **scope: Any,
    ) -> Answer:
        """Send a request as a node does; `headers` replace or add to its own."""
        body = request if isinstance(request, bytes) else request.SerializeToString()
        own = {"content-type": PROTOBUF.decode(), "content-length": str(len(body))}
        own |= (site.headers() if site else {}) | (headers or {})
        raw = [(name.encode(), value.encode()) for name, value in own.items() if value]
        return self.send(f"/v1/fleet/{what}", raw, [body], **scope)

    def send(
        self, path: str, headers: list[tuple[bytes, bytes]], body: Iterable[bytes], **scope: Any
    ) -> Answer:
        """Send a request, its body in pieces, to the guard."""
        return asyncio.run(call(self.guard, path, headers, body, **scope))

    def job(self, site: Site, array: np.ndarray) -> Message:
        """Put a job for a site into the link state, as the ServerApp does."""
        message, send = self.announced(site, array)
        send()
        return message

    def announced(self, site: Site, array: np.ndarray) -> tuple[Message, Callable[[], None]]:
        """A job that is announced to a site, and a function that puts its objects there."""
        self.state.acknowledge_task_heartbeat(self.task)  # else the run ends after a minute
        content = RecordDict({"arrays": ArrayRecord([array])})
        message = Message(content, self.node(site), "train")
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run_id)
        self.state.store_message_and_object_tree(message, get_object_tree(message), session)

        def send() -> None:
            for key, one in get_all_nested_objects(message).items():
                self.state.store_object(self.run_id, session, key, one.deflate())

        return message, send

    def activate(self, site: Site) -> Answer:
        request = ActivateNodeRequest(public_key=site.public, heartbeat_interval=30)
        return self.ask("activate-node", request, site)

    def pull(self, site: Site) -> Answer:
        return self.ask("pull-messages", PullMessagesRequest(node=self.of(site)), site)

    def of(self, site: Site) -> Node:
        return Node(node_id=self.node(site))

    def reply(self, site: Site, job: Message, content: RecordDict | Error) -> Message:
        """The reply of a site to its job."""
        job.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        reply = Message(content, reply_to=job)
        reply.metadata.__dict__["_src_node_id"] = self.node(site)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def announce(self, site: Site, reply: Message, **changes: Any) -> PushMessagesRequest:
        """The request that announces a reply; `changes` are of its metadata."""
        request = PushMessagesRequest(
            node=self.of(site), message_object_trees=[get_object_tree(reply)]
        )
        proto = message_to_proto(reply)
        proto.ClearField("content")
        if reply.has_content():
            proto.content.SetInParent()
        for name, value in changes.items():
            setattr(proto.metadata, name, value)
        request.messages_list.append(proto)
        return request

    def upload(self, site: Site, session: str, key: str, content: bytes) -> PushObjectRequest:
        return PushObjectRequest(
            node=self.of(site),
            run_id=self.run_id,
            session_id=session,
            object_id=key,
            object_content=content,
        )


async def call(
    app: Any,
    path: str,
    headers: list[tuple[bytes, bytes]],
    body: Iterable[bytes],
    stays: bool = False,
    **scope: Any,
) -> Answer:
    """One request to an ASGI application; the client goes away after it unless it `stays`."""
    pieces, taken, events = iter(body), 0, []
    upcoming = next(pieces, None)

    async def receive() -> dict[str, Any]:
        nonlocal taken, upcoming
        if upcoming is None:
            await (asyncio.Event().wait() if stays else asyncio.sleep(0))
            return {"type": "http.disconnect"}
        piece, upcoming = upcoming, next(pieces, None)
        taken += len(piece)
        return {"type": "http.request", "body": piece, "more_body": upcoming is not None}

    async def send(event: dict[str, Any]) -> None:
        events.append(event)

    full = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("203.0.113.7", 40000),
        "server": ("192.0.2.1", 9443),
        "state": {},
    }
    await app({**full, **scope}, receive, send)
    start, *rest = events
    content = b"".join(event.get("body", b"") for event in rest)
    found = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, content, taken)


__all__ = ["PATHS", "Answer", "Fleet", "Site", "call", "server_folder", "write_sites"]
