"""The real server over scripted clients, in a run's folder: started, stopped, started again.

`start_server` takes the production path (storage/resume.py, server/loop.py) with two parts of the
tests' own: a transport that plays a script, and an evaluator without a model. `run` is for a
scripted transport with a clock of its own (support/fake_transport.py), `run_virtual` for the
virtual clock over clients whose replies are computed in any order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from support.fake_transport import MOST_WAITS, Behaviour, ScriptTransport

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.core.events import Event, Observer
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
from fedgpt.core.transport import Transport
from fedgpt.privacy.plan import PrivacyPlan
from fedgpt.server.loop import Server
from fedgpt.server.metrics_line import first_line
from fedgpt.server.parts import Evaluator, Parts, RootTrainer
from fedgpt.server.privacy import make_privacy
from fedgpt.simulate.virtual_clock import VirtualTransport, make_timing
from fedgpt.storage.checkpoint import Snapshot
from fedgpt.storage.journal import Journal, RecordedTransport
from fedgpt.storage.resume import open_or_resume
from fedgpt.storage.run_folder import RunFolder
from fedgpt.storage.tables import RunIdentity

SIZE = 300  # parameters
STEP_TOKENS = 128  # 2 sequences of 64
JOB_TOKENS = 4 * STEP_TOKENS
IDENTITY = RunIdentity("run")


def options(folder: Path, rounds: int = 4, **pace: Any) -> RunOptions:
    return RunOptions(
        seed=3,
        rounds=rounds,
        run_dir=str(folder),
        model=ModelOptions(block_size=64),
        local=LocalOptions(steps=4, batch_size=2),
        pace=PaceOptions(**{"clients": 0, **pace}),
    )


class Outcome:
    """The result of one start of a server: its last state, its events and its jobs."""

    def __init__(self, server: Server, transport: Any, events: list[Event], folder: RunFolder):
        self.server, self.transport, self.events = server, transport, events
        self.summary: dict[str, Any] = {}  # empty unless the run reached its end
        self.metrics = folder.metrics.read()
        self.params, self.version = server.state.params, server.state.version

    @property
    def jobs(self) -> list[Job]:
        """Every job that was sent, in order."""
        return self.transport.jobs

    def events_of(self, *names: str) -> list[dict[str, Any]]:
        """The events of these names, as events.jsonl has them."""
        return [event.as_json() for event in self.events if event.name in names]

    @property
    def accepted(self) -> list[tuple[str, int, float]]:
        return [(e["client"], e["number"], e["seconds"]) for e in self.events_of("accept")]

    def accepted_until(self, version: int) -> int:
        """How many updates had been accepted when `version` was made."""
        count = 0
        for event in self.events_of("accept", "version"):
            if event["event"] == "version" and event["version"] == version:
                return count
            count += event["event"] == "accept"
        assert version == 0, f"version {version} was not made"
        return 0


def distance(version: int, params: np.ndarray, sample: bool) -> dict[str, float]:
    """An evaluation without a model: the mean length of a parameter."""
    value = float(np.abs(params).mean())
    return {"loss": value, "perplexity": 1.0, "bits_per_byte": value}


@dataclass(frozen=True)
class Given:
    """The parts of a server that a test may choose."""

    strategy: Strategy = field(default_factory=FedAvg)
    evaluator: Evaluator = distance
    plan: PrivacyPlan | None = None
    root: RootTrainer | None = None
    observers: Sequence[Observer] = ()
    outcomes: list[Outcome] = field(default_factory=list)  # gets the outcome, also of a failure


def start_server(o: RunOptions, connect: Callable[[Snapshot], Transport], given: Given) -> Outcome:
    """One start of the server, from version 0 or from what its folder has."""
    folder = RunFolder(o.run_dir)

    def start() -> Snapshot:
        params = np.linspace(-1, 1, SIZE, dtype=np.float32)
        return Snapshot(ServerState(params), IDENTITY, first_line(o.evaluate.samples))

    snapshot = open_or_resume(folder, o, start)
    transport = connect(snapshot)
    fresh = snapshot.state.version == 0
    privacy = make_privacy(o, given.plan, folder.path, "data", fresh)
    parts = Parts(
        o, given.strategy, transport, given.evaluator, folder, privacy=privacy, root=given.root
    )
    events: list[Event] = []
    server = Server(parts, snapshot, [events.append, *given.observers])
    del snapshot  # so that only the server decides how long its initial vector is kept
    summary: dict[str, Any] = {}
    try:
        summary = server.run()
    finally:
        inner = getattr(transport, "inner", transport)
        outcome = Outcome(server, inner, events, folder)
        outcome.summary = summary
        given.outcomes.append(outcome)
        folder.close()
    return outcome


def run(
    o: RunOptions,
    behaviours: dict[str, Behaviour],
    strategy: Strategy | None = None,
    journal: bool = False,
    loss: dict[int, float] | None = None,
    kind: type[ScriptTransport] = ScriptTransport,
    **more: Any,
) -> Outcome:
    """`start_server` over a script; `loss`: what each version scores; `more`: see Given."""

    def scores(version: int, params: np.ndarray, sample: bool) -> dict[str, float]:
        assert loss is not None
        value = loss[version]
        return {"loss": value, "perplexity": 1.0, "bits_per_byte": value}

    def connect(snapshot: Snapshot) -> Transport:
        now = snapshot.totals.seconds
        script = kind(behaviours, now, own_clock=journal)
        if not journal:
            return script
        log = Journal(Path(o.run_dir) / "wal")
        return RecordedTransport(script, log, snapshot.state.version, now)

    evaluator = distance if loss is None else scores
    return start_server(o, connect, Given(strategy or FedAvg(), evaluator, **more))


class LatePool:
    """Clients behind the virtual clock, which finish in a random order."""

    virtual = False
    at_once: int | None = None

    def __init__(self, behaviours: dict[str, Behaviour], shuffle: int = 0):
        self.behaviours, self.random = behaviours, random.Random(shuffle)
        self.jobs: list[Job] = []
        self.sizes: dict[tuple[str, int], int] = {}
        self._done: list[Reply] = []

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [ClientInfo(name, 10_000) for name in sorted(self.behaviours)]

    def newcomers(self) -> list[ClientInfo]:
        return []

    def available(self, client: str) -> bool:
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
        gone = set(keys)
        self._done = [reply for reply in self._done if (reply.client, reply.number) not in gone]

    def bytes_down(self, job: Job) -> int:
        return job.params.nbytes

    def now(self) -> float:
        raise AssertionError("a virtual run never reads the real clock")

    def close(self) -> None:
        pass


class BoundedClock(VirtualTransport):
    """A virtual clock on which a server cannot wait forever."""

    waits = 0  # since the last reply

    def receive(self, timeout: float | None) -> list[Reply]:
        replies = super().receive(timeout)
        self.waits = 0 if replies else self.waits + 1
        assert self.waits < MOST_WAITS, "the server would wait forever"
        return replies


def virtual_options(folder: Path, rounds: int = 10, **changes: Any) -> RunOptions:
    """Options of a run on the virtual clock; `changes`: other groups by name, else the pacing's."""
    groups = {
        name: changes.pop(name) for name in ("tokens", "fleet", "evaluate") if name in changes
    }
    local = {"steps": 10, "batch_size": 1, **changes.pop("local", {})}
    every = changes.pop("checkpoint", 1)
    pace = {"name": "buffer", "clients": 0, **changes}
    return RunOptions(
        seed=3,
        rounds=rounds,
        clock="virtual",
        run_dir=str(folder),
        model=ModelOptions(block_size=64),
        local=LocalOptions(**local),
        pace=PaceOptions(**pace),
        checkpoint=CheckpointOptions(every=every),
        **{"fleet": FleetOptions("published"), "evaluate": EvaluateOptions(), **groups},
    )


def run_virtual(
    folder: Path,
    behaviours: dict[str, Behaviour],
    strategy: Strategy,
    *,
    shuffle: int = 0,
    pool: type[LatePool] = LatePool,
    **changes: Any,
) -> Outcome:
    """`start_server` on the virtual clock, replies computed in an order that `shuffle` seeds."""
    o = virtual_options(folder, **changes)

    def connect(snapshot: Snapshot) -> Transport:
        clients = pool(behaviours, shuffle)
        return BoundedClock(clients, make_timing(o), snapshot.totals.seconds)

    return start_server(o, connect, Given(strategy))
