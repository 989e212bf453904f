"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498).

D_j = mean of the D_ij without the b lowest and the b highest. b is a number of clients and not a
fraction, because a fraction of a small cohort (0.2 of 4 clients) would be rounded down to 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import in_order, middle, shortage
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import at_least, option


@dataclass(frozen=True)
class TrimmedMean(Strategy):
    """Tolerates up to `trim` attackers, and uses more of the honest updates than the median."""

    refused_pacings = COMPARISON_NEEDS_COHORT

    trim: int = option(
        1,
        "Number of values removed at each end of every coordinate, which is the number of attackers"
        " to withstand.",
        unit="clients",
        allowed=at_least(1),
    )

    @property
    def needed(self) -> int:
        """Smallest number of updates in a step, so that at least one value remains."""
        return 2 * self.trim + 1

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """The cohort must have more than 2 b updates."""
        most = (pacing.goal - 1) // 2
        change = (
            f" or lower strategy.trim to at most {most}" if most else ", or take strategy=fedavg"
        )
        yield from shortage(self, self.needed, pacing, f"strategy.trim={self.trim}", change)

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The mean of the remaining values of every coordinate."""
        return middle(in_order(self, updates), self.trim, state.params)
