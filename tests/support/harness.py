"""The real server over a scripted transport, in a run's folder: started, failed, started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from support.fake_transport import Behaviour, ScriptTransport

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.core.messages import ServerState
from fedgpt.core.options import LocalOptions, ModelOptions, PaceOptions, RunOptions
from fedgpt.privacy.plan import PrivacyPlan
from fedgpt.server.loop import RootTrainer, Server
from fedgpt.server.metrics import first_record
from fedgpt.server.privacy import make_privacy
from fedgpt.storage.checkpoint import Checkpoints, RunTables, Snapshot
from fedgpt.storage.journal import Journal, RecordedTransport
from fedgpt.storage.run_folder import RunFolder

SIZE = 300
STEP_TOKENS = 128  # 2 sequences of 64
JOB_TOKENS = 4 * STEP_TOKENS


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
    """What is left of one start of a server: its last state, its events, its jobs."""

    def __init__(
        self,
        server: Server,
        transport: ScriptTransport,
        events: list[tuple[str, dict]],
        folder: RunFolder,
    ):
        self.server = server
        self.jobs = transport.jobs
        self.events = events
        self.metrics = folder.metrics.read()
        self.params, self.version = server.state.params, server.state.version

    def told(self, *names: str) -> list[dict]:
        return [about for name, about in self.events if name in names]

    @property
    def accepted(self) -> list[tuple[str, int, float]]:
        return [(e["client"], e["number"], e["seconds"]) for e in self.told("accept")]

    def accepted_until(self, version: int) -> int:
        """How many updates had been accepted when `version` was made."""
        if version == 0:
            return 0
        until = self.events.index(
            next(e for e in self.events if e[0] == "version" and e[1]["version"] == version)
        )
        return sum(name == "accept" for name, _ in self.events[:until])


def run(
    o: RunOptions,
    behaviours: dict[str, Behaviour],
    strategy: Strategy | None = None,
    journal: bool = False,
    loss: dict[int, float] | None = None,
    outcomes: list[Outcome] | None = None,
    plan: PrivacyPlan | None = None,
    root: RootTrainer | None = None,
    kind: type[ScriptTransport] = ScriptTransport,
) -> Outcome:
    """One start of the server, from scratch or from what its folder holds; `loss` of versions is
    what is scored.

    The outcome is added to `outcomes` also where the server raises.
    """
    folder = RunFolder(o.run_dir)
    snapshot = Checkpoints(folder.checkpoints, o.checkpoint.keep).recover()
    if snapshot is None:
        folder.metrics.keep([])
        params = np.linspace(-1, 1, SIZE, dtype=np.float32)
        snapshot = Snapshot(ServerState(params), RunTables("run", record=first_record()))
    else:
        version = snapshot.state.version
        folder.metrics.keep(r for r in folder.metrics.read() if r["version"] < version)

    def evaluate(version: int, params: np.ndarray, sample: bool) -> dict[str, float]:
        value = float(np.abs(params).mean()) if loss is None else loss[version]
        return {"loss": value, "perplexity": 1.0, "bits_per_byte": value}

    script = kind(behaviours, snapshot.tables.seconds, own_clock=journal)
    now = snapshot.tables.seconds
    log = (
        RecordedTransport(script, Journal(folder.wal), snapshot.state.version, now)
        if journal
        else None
    )
    events: list[tuple[str, dict]] = []
    server = Server(
        o, strategy or FedAvg(), log or script, evaluate, folder, snapshot,
        [lambda event, about: events.append((event, dict(about)))], root, journal=log,
        privacy=make_privacy(o, plan, folder.path, "data", snapshot.state.version == 0),
    )  # fmt: skip
    try:
        server.run()
    finally:
        outcome = Outcome(server, script, events, folder)
        if outcomes is not None:
            outcomes.append(outcome)
        folder.close()
    return outcome
