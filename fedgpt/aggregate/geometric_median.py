"""Geometric median, RFA (Pillutla et al. 2019, arXiv 1912.13445): argmin_z sum_i ||z - D_i||.

One update far away moves a mean by its distance, but the geometric median hardly at all. It is
found by the smoothed Weiszfeld iteration, a mean with weights 1 / r_i that are computed anew:

    z = mean_i D_i, then repeat: r_i = max(nu, ||z - D_i||) ; z <- sum_i D_i / r_i / sum_i 1 / r_i

The weights of a pass replace the weights of the previous pass. If they were multiplied, one client
would get all the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import distances, in_order, shortage, weighted
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import above, at_least, option


@dataclass(frozen=True)
class GeometricMedian(Strategy):
    """Tolerates attackers up to half of the updates; unlike the median, it is invariant under
    rotations.

    All clients have the same weight, because a client could report too many tokens.
    """

    refused_pacings = COMPARISON_NEEDS_COHORT

    nu: float = option(
        1e-6, "Distance below which an update counts as equal to the median.", allowed=above(0)
    )
    iterations: int = option(
        8,
        "Passes of Weiszfeld's algorithm. The paper needs 3 to 8.",
        unit="passes",
        allowed=at_least(1, end=10_000),
    )

    @property
    def needed(self) -> int:
        """Three, because every point between two updates is a geometric median of both."""
        return 3

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """The cohort must have at least three updates."""
        yield from shortage(self, self.needed, pacing, change=", or take strategy=fedavg")

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """z after the passes."""
        ordered = in_order(self, updates)
        weights = np.ones(len(ordered))
        for _ in range(self.iterations):
            z = weighted(ordered, weights / weights.sum(), state.params)
            weights = 1 / np.maximum(self.nu, distances(ordered, z))
        return weighted(ordered, weights / weights.sum(), state.params)
