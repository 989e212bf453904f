"""Flower's SuperLink itself, and what of it this machine's user reaches: control and runtime API.

Flower's own control API has no authentication, and starts any code as the server; here it is a unix
socket that only its user can open. The runtime API must be TCP, because Flower's programs call it:
on loopback, for processes of this user, and a task only for who has the secret. The token of a
task, which Flower then accepts, is in the arguments of a process, where every user can read it.
"""

from __future__ import annotations

import asyncio
import copy
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from subprocess import Popen
from typing import Any

from fastapi import FastAPI
from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.routers.control.middlewares import (
    ControlAuthenticationMiddleware,
    ControlEventLogMiddleware,
    ControlLicenseMiddleware,
    ControlSensitiveResponseMiddleware,
)
from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
from sqlalchemy.exc import SQLAlchemyError
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import PRIVATE
from fedgpt.flower.deploy import keeper
from fedgpt.flower.deploy.database import bring_up_to_date
from fedgpt.flower.deploy.guard import read_body
from fedgpt.flower.deploy.limits import Refused
from fedgpt.flower.deploy.link_state import LinkState
from fedgpt.flower.deploy.listener import http_config
from fedgpt.flower.deploy.objects_in_files import ObjectsInFiles
from fedgpt.flower.deploy.waiting import REPLY, App, Bell, Event, Receive, Send, Wish, let_wait
from fedgpt.flower.launch import FLOWER_ENV

CONTROL, RUNTIME = ("/v1/control/", "/health"), ("/v1/runtime/",)
REPLIES = "/v1/runtime/pull-messages"
LONGEST_QUESTION = 8 << 20  # bytes of the ids of the messages whose replies are asked for
LONGEST_SOCKET = 100  # bytes of the path of a unix socket
CONTROL_SOCKET = "control.sock"
DATABASE, OBJECTS = "link.db", "link.objects"  # in the server's folder
CLOSE_SECONDS = 1.0  # for answers that are under way when the link stops
_LOOPBACK = "127.0.0.1"
_TCP = Path("/proc/self/net/tcp")
# layers that do nothing for a fleet or runtime path
_IDLE = {
    ControlAuthenticationMiddleware,
    ControlEventLogMiddleware,
    ControlLicenseMiddleware,
    ControlSensitiveResponseMiddleware,
    FleetEventLogMiddleware,
}
# Flower's switches for its former gRPC servers, which would listen beside the guard
_OPENINGS = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")


def flower_app(folder: Path, secret: bytes, bell: Bell | None = None) -> FastAPI:
    """Flower's SuperLink with its state in the folder; its tasks are for who has the secret.

    The bell rings for each message and object that it stores.

    In its other isolation mode Flower ignores the secret and gives a task to whoever asks. Raises
    FedGPTError for a damaged database.
    """
    for name in _OPENINGS:
        os.environ.pop(name, None)
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=_LOOPBACK,
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,  # replaced below
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app, bell = create_app(config, SuperLinkLifespan), bell or Bell()
    factory, database = app.state.linkstate_factory, folder / DATABASE
    objects = ObjectsInFiles(folder / OBJECTS, bell)
    try:
        bring_up_to_date(database)
        state = LinkState(database, factory.federation_manager, objects, bell)
    except (SQLAlchemyError, sqlite3.Error) as damage:
        raise FedGPTError(
            f"{database} cannot be used: {damage.__class__.__name__}; move it away, with"
            " the files beside it of the same name, to begin with a new one"
        ) from None
    factory.objectstore_factory.store_instance, factory.state_instance = objects, state
    return app


def without_control(app: FastAPI) -> FastAPI:
    """Flower's application for requests that are not of its control API.

    It leaves out what Flower has around each request for that API and for a log of events that is
    switched off: five layers, each of which costs a request a task and two queues.
    """
    one = copy.copy(app)
    one.user_middleware = [layer for layer in app.user_middleware if layer.cls not in _IDLE]
    one.middleware_stack = None  # made at the first request
    return one


class Only:
    """An application of which the paths with one of the beginnings are served; others get 403.

    With a bell, a question for replies waits for the next one.
    """

    def __init__(self, app: App, beginnings: tuple[str, ...], bell: Bell | None = None):
        self._app, self._beginnings, self._bell = app, beginnings, bell

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        if not path.startswith(self._beginnings) or scope["raw_path"] != path.encode():
            await _refuse(send, 403)
        elif path != REPLIES or self._bell is None:
            await self._app(scope, receive, send)
        else:
            try:
                body = await read_body(receive, LONGEST_QUESTION)
            except Refused as refused:
                await _refuse(send, refused.status)
                return
            wish = Wish(REPLY, b"")
            for event in await let_wait(self._app, scope, body, receive, self._bell, wish):
                await send(event)


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class OwnUser(H11Protocol):
    """HTTP for processes of this user and of root; another user's connection is reset."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Look whose connection it is."""
        super().connection_made(transport)
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if isinstance(peer, tuple) and owner(peer, own) not in (os.getuid(), 0):
            transport.abort()


def owner(local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """User id of the process of this machine at the `local` end of a connection over IPv4.

    Own id on systems without /proc; None if there is no such connection.
    """
    if not _TCP.exists():
        return os.getuid()
    ends = [_as_kernel(*local), _as_kernel(*remote)]
    for line in _TCP.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:3] == ends:
            return int(fields[7])
    return None


@asynccontextmanager
async def served(app: App, listening: socket.socket, state: dict[str, Any]) -> AsyncIterator[None]:
    """Serve an application on a socket while the block runs."""
    config, connections = http_config(app), ServerState()
    loop = asyncio.get_running_loop()
    with closing(listening):
        server = await loop.create_server(
            lambda: OwnUser(config, connections, state), sock=listening
        )
        try:
            yield
        finally:
            server.close()
            for protocol in list(connections.connections):
                protocol.shutdown()
            if connections.tasks:
                await asyncio.wait(connections.tasks, timeout=CLOSE_SECONDS)


def runtime_socket() -> socket.socket:
    """A socket on a free loopback port."""
    one = socket.socket()
    one.bind((_LOOPBACK, 0))
    return one


def control_socket(path: Path) -> socket.socket:
    """A unix socket for this user only; raises FedGPTError for a path that is too long for one."""
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise FedGPTError(
            f"{path} is too long for a socket: {len(os.fsencode(path))} bytes, at most"
            f" {LONGEST_SOCKET}; move the server's folder to a shorter path"
        )
    path.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        one.bind(str(path))
    finally:
        os.umask(mask)
    return one


@asynccontextmanager
async def superexec(folder: Path, port: int, secret: bytes) -> AsyncIterator[Popen[bytes]]:
    """Flower's starter of ServerApps while the block runs; it and all that it started end then.

    They also end when this process is killed.
    """
    path = folder / "superexec.secret"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(secret)
    command = ["flower-superexec", "--insecure", "--runtime-api-address", f"{_LOOPBACK}:{port}"]
    # its own watch, should the keeper be killed; it is slower
    command += ["--parent-pid", str(os.getpid()), "--superexec-auth-secret-file", str(path)]
    # Flower starts its own programs by name: those beside this interpreter come first
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    process = subprocess.Popen(
        [sys.executable, "-m", keeper.__name__, *command],
        env={**os.environ, **FLOWER_ENV, "PATH": programs},
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the link alone
    )
    try:
        yield process
    finally:
        # in a thread: a ServerApp that ends may still call the runtime API
        await asyncio.to_thread(process.communicate)
        path.unlink(missing_ok=True)


def _as_kernel(address: str, port: int) -> str:
    number = int.from_bytes(socket.inet_aton(address), sys.byteorder)
    return f"{number:08X}:{port:04X}"
