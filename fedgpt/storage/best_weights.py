"""The best weights so far by THE score of a task: kept in a file, restored by evaluate.rollback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.core.options import RunOptions
from fedgpt.core.score import LANGUAGE, Score
from fedgpt.storage.checkpoint import Checkpoints, Snapshot

PREFIX = "best/"


class BestWeights:
    """Two things that a run may do with its best version; neither costs anything where it is not
    asked for.
    """

    def __init__(
        self,
        options: RunOptions,
        checkpoints: Checkpoints,
        snapshot: Snapshot,
        score: Score = LANGUAGE.score,
    ):
        """The file may be of a version after the snapshot's: its weights are as good as they
        were.
        """
        self.options, self.checkpoints, self.score = options, checkpoints, score
        kept = checkpoints.load_best() if options.checkpoint.best else None
        self._saved = score.worst if kept is None else kept[1]
        self._state, self._best = _restored(snapshot.extra, score)

    def keep(self, record: Mapping[str, Any], params: np.ndarray | None) -> None:
        """Write a scored version's weights, where no version before was as good."""
        value = record.get(self.score.name, self.score.worst)
        better = self.score.better(value, self._saved)
        if params is not None and self.options.checkpoint.best and better:
            self._saved = value
            self.checkpoints.save_best(params, record["version"], value)

    def decide(self, state: ServerState, value: float) -> tuple[ServerState, dict[str, int]]:
        """(the state to go on with, what the record says of it): the best one's weights and memory
        after a regress.
        """
        allowed = self.score.tolerated(self._best, self.options.evaluate.rollback or 0.0)
        # NaN is worse, too
        worse = value != allowed and not self.score.better(value, allowed)
        if self._state is not None and worse:
            best = self._state
            # what has been released has been released: correlated noise goes on from there
            private = {
                name: array for name, array in state.memory.items() if name.startswith("privacy/")
            }
            memory = {**best.memory, **private}
            return replace(state, params=best.params, memory=memory), {"restored": best.version}
        if self._state is None or self.score.better(value, self._best):
            self._state, self._best = state, value
        return state, {}

    def memory(self) -> dict[str, np.ndarray]:
        """For a checkpoint: what a restart could have to go back to."""
        if self._state is None:
            return {}
        best = self._state
        memory = {f"{PREFIX}memory/{name}": array for name, array in best.memory.items()}
        numbers = {
            f"{PREFIX}loss": np.array(self._best),
            f"{PREFIX}version": np.array(best.version),
        }
        return {f"{PREFIX}params": best.params, **numbers, **memory}


def _restored(extra: Mapping[str, np.ndarray], score: Score) -> tuple[ServerState | None, float]:
    if f"{PREFIX}params" not in extra:
        return None, score.worst
    start = f"{PREFIX}memory/"
    memory = {
        name.removeprefix(start): array for name, array in extra.items() if name.startswith(start)
    }
    version = int(extra[f"{PREFIX}version"])
    return ServerState(extra[f"{PREFIX}params"], version, memory), float(extra[f"{PREFIX}loss"])
