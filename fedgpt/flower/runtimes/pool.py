"""runtime=pool: many simulated clients in worker processes of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedgpt.core.notices import saying
from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.core.runtimes import Runtime


@dataclass(frozen=True)
class Pool(Runtime):
    """Persistent worker processes; arrays are passed through shared memory."""

    name = "pool"
    limits = (
        "It uses one machine.",
        "A worker process trains one client at a time: with more clients than workers, the rest"
        " wait in a queue.",
    )

    def start(
        self,
        options: RunOptions,
        clients: int,
        resources: Resources,
        environment: Mapping[str, str],
    ) -> None:
        """Run the server in this process, on a grid of `resources.workers` worker processes."""
        with saying("loading Flower"):
            from fedgpt.flower.pool.grid import PoolGrid
            from fedgpt.flower.pool.workers import WorkerSettings
            from fedgpt.flower.run_config import run_config_of
            from fedgpt.flower.server_app import run_on

        settings = WorkerSettings(
            "fedgpt.flower.client_app:app",
            resources.workers,
            resources.threads,
            run_config_of(options),
            environment,
            resources.gpus,
        )
        with PoolGrid(clients, settings) as grid:
            run_on(grid, options)
