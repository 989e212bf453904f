"""The best weights so far, by the task's score: a copy on disk, and the target of a rollback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.core.options import RunOptions
from fedgpt.core.score import Score
from fedgpt.storage.checkpoint import Checkpoints, Snapshot

PREFIX = "best/"  # prefix of the best weights among the extra arrays of a checkpoint


class BestWeights:
    """Keeps the best version in a file (checkpoint.best), and returns to it (evaluate.rollback)."""

    def __init__(
        self, options: RunOptions, checkpoints: Checkpoints, snapshot: Snapshot, score: Score
    ):
        """Continue from a snapshot; the file may contain a later version, whose weights are still
        valid.
        """
        self.options, self.checkpoints, self.score = options, checkpoints, score
        self._run = snapshot.identity.run
        kept = checkpoints.load_best(self._run) if options.checkpoint.best else None
        self._kept = score.worst if kept is None else kept[1]
        self._state, self._value = _restored(snapshot.extra, score)

    def keep(self, metrics: Mapping[str, Any], params: np.ndarray | None) -> None:
        """Write a scored version's weights to the file if no earlier version has an equal or better
        score.
        """
        value = metrics.get(self.score.name, self.score.worst)
        if params is None or not self.options.checkpoint.best:
            return
        if self.score.better(value, self._kept):
            self._kept = value
            self.checkpoints.save_best(params, metrics["version"], value, self._run)

    def decide(self, state: ServerState, value: float) -> tuple[ServerState, dict[str, int]]:
        """Return (the state to continue with, fields for the metrics line) for a scored version.

        If the score is worse than evaluate.rollback allows, the best version's weights and memory
        are restored.
        """
        if self._state is not None and not self._acceptable(value):
            best = self._state
            # a rollback does not undo releases, so correlated noise continues from the last release
            private = {n: array for n, array in state.memory.items() if n.startswith("privacy/")}
            memory = {**best.memory, **private}
            restored = replace(state, params=best.params, memory=memory)
            return restored, {"restored": best.version}
        if self._state is None or self.score.better(value, self._value):
            self._state, self._value = state, value
        return state, {}

    def _acceptable(self, value: float) -> bool:
        """Whether a score is worse than the best by at most the allowed share; False for NaN."""
        allowed = self.score.tolerated(self._value, self.options.evaluate.rollback or 0.0)
        return value == allowed or self.score.better(value, allowed)

    def memory(self) -> dict[str, np.ndarray]:
        """Arrays for a checkpoint: the version to which a restarted server may have to return."""
        if self._state is None:
            return {}
        best = self._state
        memory = {f"{PREFIX}memory/{name}": array for name, array in best.memory.items()}
        value, version = np.array(self._value), np.array(best.version)
        numbers = {f"{PREFIX}value": value, f"{PREFIX}version": version}
        return {f"{PREFIX}params": best.params, **numbers, **memory}


def _restored(extra: Mapping[str, np.ndarray], score: Score) -> tuple[ServerState | None, float]:
    if f"{PREFIX}params" not in extra:
        return None, score.worst
    start = f"{PREFIX}memory/"
    memory = {n.removeprefix(start): array for n, array in extra.items() if n.startswith(start)}
    version = int(extra[f"{PREFIX}version"])
    name = "value" if f"{PREFIX}value" in extra else "loss"  # its name in format 3
    return ServerState(extra[f"{PREFIX}params"], version, memory), float(extra[f"{PREFIX}{name}"])
