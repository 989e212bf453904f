"""The best weights so far, by held-out loss: kept in a file, and gone back to where
`evaluate.rollback` says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.core.options import RunOptions
from fedgpt.storage.checkpoint import Checkpoints, Snapshot

PREFIX = "best/"


class BestWeights:
    """Two things that a run may do with its best version; neither costs anything where it is not
    asked for.
    """

    def __init__(self, options: RunOptions, checkpoints: Checkpoints, snapshot: Snapshot):
        """The file may be of a version after the snapshot's: its weights are as good as they
        were.
        """
        self.options, self.checkpoints = options, checkpoints
        kept = checkpoints.load_best() if options.checkpoint.best else None
        self._lowest = math.inf if kept is None else kept[1]
        self._state, self._loss = _restored(snapshot.extra)

    def keep(self, record: Mapping[str, Any], params: np.ndarray | None) -> None:
        """Write a scored version's weights, where no version before was as good."""
        loss = record.get("loss", math.inf)
        if params is not None and self.options.checkpoint.best and loss < self._lowest:
            self._lowest = loss
            self.checkpoints.save_best(params, record["version"], loss)

    def decide(self, state: ServerState, loss: float) -> tuple[ServerState, dict[str, int]]:
        """(the state to go on with, what the record says of it): the best one's weights and memory
        after a regress.
        """
        allowed = self._loss * (1 + (self.options.evaluate.rollback or 0.0))
        if self._state is not None and not loss <= allowed:  # NaN is worse, too
            best = self._state
            # what has been released has been released: correlated noise goes on from there
            private = {
                name: array for name, array in state.memory.items() if name.startswith("privacy/")
            }
            memory = {**best.memory, **private}
            return replace(state, params=best.params, memory=memory), {"restored": best.version}
        if self._state is None or loss < self._loss:
            self._state, self._loss = state, loss
        return state, {}

    def memory(self) -> dict[str, np.ndarray]:
        """For a checkpoint: what a restart could have to go back to."""
        if self._state is None:
            return {}
        best = self._state
        memory = {f"{PREFIX}memory/{name}": array for name, array in best.memory.items()}
        numbers = {
            f"{PREFIX}loss": np.array(self._loss),
            f"{PREFIX}version": np.array(best.version),
        }
        return {f"{PREFIX}params": best.params, **numbers, **memory}


def _restored(extra: Mapping[str, np.ndarray]) -> tuple[ServerState | None, float]:
    if f"{PREFIX}params" not in extra:
        return None, math.inf
    start = f"{PREFIX}memory/"
    memory = {
        name.removeprefix(start): array for name, array in extra.items() if name.startswith(start)
    }
    version = int(extra[f"{PREFIX}version"])
    return ServerState(extra[f"{PREFIX}params"], version, memory), float(extra[f"{PREFIX}loss"])
