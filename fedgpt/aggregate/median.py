"""Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498): D_j = median_i D_ij.

A minority of attackers cannot move the middle of the sorted values beyond the honest ones. For an
even number of updates it is the mean of the two values in the middle, because the lower one alone
would be biased.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import in_order, middle, shortage
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import Pacing, ServerState, Update


@dataclass(frozen=True)
class Median(Strategy):
    """Tolerates attackers up to half of the updates, without an option.

    All clients have the same weight.
    """

    refused_pacings = COMPARISON_NEEDS_COHORT

    @property
    def needed(self) -> int:
        """Three, because the median of two is their mean."""
        return 3

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """The cohort must have at least three updates."""
        yield from shortage(self, self.needed, pacing, change=", or take strategy=fedavg")

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The median of every coordinate."""
        ordered = in_order(self, updates)
        return middle(ordered, (len(ordered) - 1) // 2, state.params)
