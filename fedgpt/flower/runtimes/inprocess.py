"""runtime=inprocess: the server and all clients in one process, for debugging and tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.core.runtimes import Runtime


@dataclass(frozen=True)
class InProcess(Runtime):
    """Each job runs in the thread of the server loop, while the server waits for a reply."""

    name = "inprocess"
    summary = (
        "server and clients in one process, one client after the other: for debugging and tests"
    )
    limits = (
        "It uses one process and at most one GPU.",
        "Only one client trains at a time; a deadline takes effect when that client is done.",
        "A client that crashes its process ends the run; runtime.watchdog does so for one that"
        " hangs.",
    )
    in_process = True

    def start(
        self,
        options: RunOptions,
        clients: int,
        resources: Resources,
        environment: Mapping[str, str],
    ) -> None:
        """Run the server in this process, on a grid that calls the ClientApp itself."""
        from fedgpt.flower.client_app import app
        from fedgpt.flower.in_process_grid import InProcessGrid
        from fedgpt.flower.run_config import run_config_of
        from fedgpt.flower.server_app import run_on

        state = environment["FEDGPT_STATE_DIR"]
        run_on(InProcessGrid(app, clients, run_config_of(options), state), options)
