"""A real server on the virtual clock over scripted clients whose replies are computed in any
order.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support.fake_transport import Behaviour

from fedgpt.aggregate.base import Strategy
from fedgpt.core.messages import ClientInfo, Job, Reply, ServerState
from fedgpt.core.options import (
    CheckpointOptions,
    EvaluateOptions,
    FleetOptions,
    LocalOptions,
    ModelOptions,
    PaceOptions,
    RunOptions,
)
from fedgpt.server.loop import Server
from fedgpt.server.metrics import first_record
from fedgpt.simulate.fleet import make_timing
from fedgpt.simulate.virtual_clock import VirtualTransport
from fedgpt.storage.checkpoint import Checkpoints, RunTables, Snapshot
from fedgpt.storage.run_folder import RunFolder

SIZE = 300


class LatePool:
    """Real clients, as the virtual clock sees them: done in an order that means nothing."""

    virtual = False
    at_once: int | None = None

    def __init__(self, behaviours: dict[str, Behaviour], shuffle: int = 0):
        self.behaviours, self.random = behaviours, random.Random(shuffle)
        self.jobs: list[Job] = []
        self.sizes: dict[tuple[str, int], int] = {}
        self._done: list[Reply] = []

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [ClientInfo(name, 10_000) for name in sorted(self.behaviours)]

    def there(self, client: str) -> bool:
        return True

    def send(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self.jobs.append(job)
            for _, reply in self.behaviours[job.client](job):
                self.sizes[job.client, job.number] = reply.bytes
                self._done.append(reply)

    def receive(self, timeout: float | None) -> list[Reply]:
        if not self._done:
            return []
        return [self._done.pop(self.random.randrange(len(self._done)))]

    def abandon(self, keys: Iterable[tuple[str, int]]) -> None:
        self._done = [
            reply for reply in self._done if (reply.client, reply.number) not in set(keys)
        ]

    def bytes_down(self, job: Job) -> int:
        return job.params.nbytes

    def now(self) -> float:
        raise AssertionError("a virtual run never asks for real time")

    def close(self) -> None:
        pass


@dataclass
class VirtualRun:
    server: Server
    pool: LatePool
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    events: list[tuple[str, dict[str, Any]]]


def serve(
    folder: Path, behaviours: dict[str, Behaviour], strategy: Strategy, *, rounds: int = 10, tokens: int = 0,
    fleet: FleetOptions | None = None, local: dict[str, Any] | None = None, checkpoint: int = 1, shuffle: int = 0,
    evaluate: EvaluateOptions | None = None, pool: type[LatePool] = LatePool, **pace: Any,
) -> VirtualRun:  # fmt: skip
    """One run from its folder's checkpoint, or from version 0, to its end."""
    options = RunOptions(
        seed=3,
        rounds=rounds,
        tokens=tokens,
        clock="virtual",
        run_dir=str(folder),
        model=ModelOptions(block_size=64),
        local=LocalOptions(**{"steps": 10, "batch_size": 1, **(local or {})}),
        pace=PaceOptions(**{"name": "buffer", "clients": 0, **pace}),
        fleet=fleet or FleetOptions("published"),
        evaluate=evaluate or EvaluateOptions(),
        checkpoint=CheckpointOptions(every=checkpoint),
    )
    run_folder = RunFolder(folder)
    snapshot = Checkpoints(run_folder.checkpoints, 2).recover()
    if snapshot is None:
        params = np.linspace(-1, 1, SIZE, dtype=np.float32)
        snapshot = Snapshot(ServerState(params), RunTables("run", record=first_record()))
    version = snapshot.state.version
    run_folder.metrics.keep(r for r in run_folder.metrics.read() if r["version"] < version)
    run_folder.events.keep([])

    def score(version, params, sample):
        loss = float(np.abs(params).mean())
        return {"loss": loss, "perplexity": 1.0, "bits_per_byte": loss}

    clients, events = pool(behaviours, shuffle), []

    def observe(event, about):
        events.append((event, dict(about)))
        if event in ("dispatch", "accept", "reject"):
            run_folder.events.append({"event": event, **about})

    transport = VirtualTransport(clients, make_timing(options), snapshot.tables.seconds)
    server = Server(options, strategy, transport, score, run_folder, snapshot, [observe])
    snapshot = params = None  # the server alone says how long the vector of its start is kept
    try:
        summary = server.run()
    finally:
        run_folder.close()
    return VirtualRun(server, clients, summary, run_folder.metrics.read(), events)
