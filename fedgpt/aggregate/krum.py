"""Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): the mean of the updates with the closest neighbours.

score_i = sum of the n - f - 2 smallest ||D_i - D_j||^2 over the others; D = mean of the m lowest scores. Distances come
from differences of updates: |a|^2 + |b|^2 - 2 a b on float32 weights loses small updates (5 times too large at 0.01).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import COUNT, WHOLE, Strategy, check
from fedgpt.aggregate.blocks import blocks, in_order, shortage, weighted
from fedgpt.aggregate.refusals import ROBUST
from fedgpt.core.messages import Pacing, ServerState, Update


@dataclass(frozen=True)
class Krum(Strategy):
    """Withstands `attackers` that stand apart as a whole; clients whose text differs much look the same to it."""

    because = ROBUST

    attackers: int = 1  # f
    keep: int = 0  # m, updates to average; 0 is n - f, and 1 the single Krum

    def __post_init__(self) -> None:
        check(self, attackers=COUNT, keep=WHOLE)

    @property
    def needed(self) -> int:
        """The paper's bound."""
        return 2 * self.attackers + 3

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """n >= 2 f + 3, and no attacker among those kept."""
        most = (pacing.goal - 3) // 2
        change = f" or lower strategy.attackers to at most {most}" if most > 0 else ", or take strategy=median"
        yield from shortage(self, self.needed, pacing, f"strategy.attackers={self.attackers}", change)
        if self.keep > max(1, pacing.goal - self.attackers):
            yield (
                f"strategy.keep={self.keep} of {pacing.goal} updates would keep some of strategy.attackers="
                f"{self.attackers}: at most {pacing.goal - self.attackers} are allowed; lower it, or set 0 for that"
            )

    def combine(self, updates: Sequence[Update], state: ServerState, root: Update | None = None) -> np.ndarray:
        """The mean of the updates kept, all with the same weight."""
        ordered = in_order(self, updates, self.needed)
        if not ordered:
            return np.zeros_like(state.params)
        keep = min(len(ordered), self.keep or len(ordered) - self.attackers)
        lowest = np.argsort(self.scores(ordered), kind="stable")[:keep]
        kept = [ordered[i] for i in sorted(lowest)]
        return weighted(kept, np.full(keep, 1 / keep), state.params)

    def scores(self, updates: Sequence[Update]) -> np.ndarray:
        """(updates,) float64: sums of squared distances to the nearest others; low is trusted."""
        count = len(updates)
        squares = np.zeros((count, count))
        for _, block in blocks(updates):
            for i in range(count - 1):
                apart = block[i + 1 :] - block[i]
                squares[i, i + 1 :] += np.einsum("ij,ij->i", apart, apart)
        squares += squares.T
        return np.sort(squares, axis=1)[:, 1 : count - self.attackers - 1].sum(axis=1)  # column 0 is the update itself
