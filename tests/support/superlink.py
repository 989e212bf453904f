"""Flower's SuperLink in a thread of this process, and a node whose upload a test controls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.main import create_app

from fedgpt.flower.deploy.connection import FleetConnection


class LiveSuperLink:
    """A SuperLink on a port of this machine with one run; its state is in memory."""

    def __init__(self, port: int, app, closing: ExitStack):
        self.address, self._closing = f"127.0.0.1:{port}", closing
        self.state = app.state.linkstate_factory.state()
        self.run_id = self.state.create_run(
            None, None, None, {}, NOOP_FEDERATION_ID, None, None, "flwr-serverapp"
        )
        (task,) = self.state.get_tasks(run_ids=[self.run_id])
        self._token = self.state.claim_task(task.task_id)
        self.state.activate_task(task.task_id)

    def grid(self) -> HttpGrid:
        """The grid that Flower passes to a ServerApp of the run."""
        TaskIdentity.run_id, TaskIdentity.task_id = self.run_id, 1
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        grid = HttpGrid(self.address, insecure=True, token=self._token)
        grid.set_run(Run.create_empty(run_id=self.run_id))
        self._closing.callback(grid.close)
        return grid

    def node(self, key: ec.EllipticCurvePrivateKey | None = None) -> tuple[int, FleetConnection]:
        """A registered and connected node."""
        key = key or ec.generate_private_key(ec.SECP384R1())
        public = public_key_to_bytes(key.public_key())
        if self.state.get_node_id_by_public_key(public) is None:
            self.state.create_node("", "", public, 30.0)
        connection = FleetConnection(self.address, key, None)
        self._closing.callback(connection.close)
        return connection.activate(), connection

    def lose(self, node: int) -> None:
        """Let a node's heartbeat be overdue, as a minute after its machine was switched off."""
        self.state.acknowledge_node_heartbeat(node, -10.0)


@contextmanager
def live_superlink() -> Iterator[LiveSuperLink]:
    """A running SuperLink; it and its port are gone after the block."""
    app = create_app()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the SuperLink does not start"
        time.sleep(0.01)
    with ExitStack() as closing:
        closing.callback(thread.join, timeout=10)
        closing.callback(setattr, server, "should_exit", True)
        yield LiveSuperLink(server.servers[0].sockets[0].getsockname()[1], app, closing)


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
