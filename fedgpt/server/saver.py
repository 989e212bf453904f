"""The data for a restart: snapshots, their checkpoints, the journal and the best weights."""

from __future__ import annotations

from dataclasses import replace

from fedgpt.server.parts import Parts
from fedgpt.storage.best_weights import BestWeights
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.journal import RecordedTransport


class Saver:
    """Keeps the newest snapshot, and writes it when a checkpoint is due."""

    def __init__(self, parts: Parts, snapshot: Snapshot):
        transport, options = parts.transport, parts.options
        self.journal = transport if isinstance(transport, RecordedTransport) else None
        committed = None if self.journal is None else self.journal.journal.drop
        folder = parts.folder.checkpoints
        self.checkpoints = Checkpoints(folder, options.checkpoint.keep, committed)
        self.best = BestWeights(options, self.checkpoints, snapshot, parts.scoring.score)
        self.snapshot = replace(snapshot, clients=snapshot.clients.frozen())
        self._saved: int | None = None  # version of the newest checkpoint that was requested

    def take(self, snapshot: Snapshot) -> None:
        """Store the snapshot after a new version."""
        self.snapshot = snapshot
        if self.journal is not None and self.journal.step(snapshot.state.version):
            self.checkpoints.ended()  # this start has led further: the next one repeats its version

    def save(self) -> None:
        """Write the newest snapshot in the background, unless it is already being written."""
        if self._saved != self.snapshot.state.version:
            self._saved = self.snapshot.state.version
            self.checkpoints.save(self.snapshot)

    def end(self, over: bool) -> None:
        """Stop in an orderly way; with `over` a restart would stop at the same place again."""
        self.save()
        self.checkpoints.wait()
        self.checkpoints.ended()
        if over and self.journal is not None:
            self.journal.over()
