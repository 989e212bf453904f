"""Geometric median, RFA (Pillutla et al. 2019, arXiv 1912.13445), by the smoothed Weiszfeld
iteration.

argmin_z sum_i ||z - D_i||: from z = mean, repeat z <- sum_i D_i / r_i / sum_i 1 / r_i, r_i =
max(nu, ||z - D_i||). Each pass starts again from equal weights: weights carried from pass to pass
would collapse onto one client.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import COUNT, POSITIVE, Strategy, check
from fedgpt.aggregate.blocks import distances, in_order, shortage, weighted
from fedgpt.aggregate.refusals import ROBUST
from fedgpt.core.messages import Pacing, ServerState, Update


@dataclass(frozen=True)
class GeometricMedian(Strategy):
    """Withstands attackers up to half of the updates and does not depend on the axes, as the median
    does.

    Every client counts the same: tokens would let one that does much count for many.
    """

    because = ROBUST
    needed = 3  # of two, every point between them is one

    nu: float = 1e-6  # distances below it count as it
    iterations: int = 8  # passes; the paper needs 3 to 8

    def __post_init__(self) -> None:
        check(self, nu=POSITIVE, iterations=COUNT)

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """At least three updates."""
        yield from shortage(self, self.needed, pacing, change=", or take strategy=fedavg")

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """z after the passes."""
        ordered = in_order(self, updates, self.needed)
        weights = np.ones(len(ordered))
        for _ in range(self.iterations):
            z = weighted(ordered, weights / weights.sum(), state.params)
            weights = 1 / np.maximum(self.nu, distances(ordered, z))
        return weighted(ordered, weights / weights.sum(), state.params)
