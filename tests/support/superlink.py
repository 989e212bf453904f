"""Flower's SuperLink in a thread of this process, and a node whose upload a test controls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app

from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.guard import FLEET, App, Event, Receive, Send


class LiveSuperLink:
    """A SuperLink on a port of this machine with one run; its state is in memory."""

    def __init__(self, closing: ExitStack, run_config: Mapping[str, Any]):
        self._app, self._closing, self._port = create_app(), closing, 0
        self._front = self._app  # what the port has
        self._start()
        self.address = f"127.0.0.1:{self._port}"
        self.state = self._app.state.linkstate_factory.state()
        self.run_id = self.state.create_run(
            None, None, None, dict(run_config), NOOP_FEDERATION_ID, None, None, "flwr-serverapp"
        )
        (task,) = self.state.get_tasks(run_ids=[self.run_id])
        self._token = self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)
        self._keep_alive(task.task_id)

    def _keep_alive(self, task: int) -> None:
        """Say that the ServerApp is alive, without which its run ends after a minute."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(10.0):
                self.state.acknowledge_task_heartbeat(task)

        thread = in_thread(beat)
        self._closing.callback(thread.join, 10)
        self._closing.callback(over.set)

    def grid(self) -> HttpGrid:
        """The grid that Flower passes to a ServerApp of the run."""
        TaskIdentity.run_id, TaskIdentity.task_id = self.run_id, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        grid = HttpGrid(self.address, insecure=True, token=self._token)
        grid.set_run(Run.create_empty(run_id=self.run_id))
        self._closing.callback(grid.close)
        return grid

    def registered(self, key: ec.EllipticCurvePrivateKey) -> int:
        """The id of the node with this key, which is registered if it was not."""
        public = public_key_to_bytes(key.public_key())
        known = self.state.get_node_id_by_public_key(public)
        return known or self.state.create_node("", "", public, 30.0)

    def node(self, key: ec.EllipticCurvePrivateKey | None = None) -> tuple[int, FleetConnection]:
        """A registered and connected node."""
        key = key or ec.generate_private_key(ec.SECP384R1())
        self.registered(key)
        connection = FleetConnection(self.address, key, None)
        self._closing.callback(connection.close)
        return connection.activate(), connection

    def restart(self, seconds: float) -> None:
        """Let nobody reach the SuperLink for some seconds."""
        self.stop()
        time.sleep(seconds)
        self._start()

    def put_in_front(self, front: Callable[[App], App]) -> None:
        """Let `front` of the SuperLink's application answer the nodes' requests."""
        guard = front(self._app)

        async def app(scope: Event, receive: Receive, send: Send) -> None:
            fleet = scope["type"] == "http" and scope["path"].startswith(FLEET)
            await (guard if fleet else self._app)(scope, receive, send)

        self.stop()
        self._front = app
        self._start()

    def stop(self) -> None:
        """End the server; the port is free then."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)

    def _start(self) -> None:
        config = uvicorn.Config(self._front, port=self._port, log_level="error", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline and self._thread.is_alive(), "it does not start"
            time.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def lose(self, node: int) -> None:
        """Let a node's heartbeat be overdue, as a minute after its machine was switched off."""
        self.state.acknowledge_node_heartbeat(node, -10.0)


@contextmanager
def live_superlink(run_config: Mapping[str, Any] = MappingProxyType({})) -> Iterator[LiveSuperLink]:
    """A running SuperLink; it and its port are gone after the block."""
    with ExitStack() as closing:
        link = LiveSuperLink(closing, run_config)
        closing.callback(link.stop)
        yield link


@contextmanager
def persistent_node(
    link: LiveSuperLink, key: ec.EllipticCurvePrivateKey, app: str, config: Mapping[str, Any]
) -> Iterator[subprocess.Popen[str]]:
    """A process with a PersistentNode; `app` is its ClientApp as module:name."""
    link.registered(key)
    about = {"address": link.address, "app": app, "config": dict(config)}
    about["key"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    with node_process(about) as process:
        yield process


@contextmanager
def node_process(about: Mapping[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """A process with a PersistentNode: `address`, `key`, `app`, `config`, and `ca` if with TLS."""
    command = [sys.executable, "-m", "support.persistent_client"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    with subprocess.Popen(
        command,
        # the bits of an update depend on the number of threads
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(about))
        process.stdin.close()
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def send(connection: FleetConnection, reply: Message, pause: float = 0.0) -> None:
    """Announce a reply and upload it, with `pause` seconds before each object."""
    upload = connection.announce(reply, 0.1)
    while upload.objects:
        time.sleep(pause)
        connection._at_once = 1
        connection.upload(upload)


def next_message(connection: FleetConnection) -> Message:
    """The next message for a node, which must come within 10 seconds."""
    deadline = time.monotonic() + 10
    while (message := connection.receive()) is None:
        assert time.monotonic() < deadline, "no message"
        time.sleep(0.02)
    return message


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """Start `work` in a thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
