"""Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): the mean of the updates with the closest
neighbours.

score_i = sum of the n - f - 2 smallest ||D_i - D_j||^2 over the others; D = mean of the m lowest
scores. Distances are |a|^2 + |b|^2 - 2 a b, products of pieces in float32 and their sums in
float64: off by about 1e-7 of |a|^2 + |b|^2. On weights that would lose small updates (5 times too
large at 0.01); on updates nothing larger is taken off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedgpt.aggregate.base import COUNT, WHOLE, Strategy, check
from fedgpt.aggregate.blocks import in_order, middle, shortage
from fedgpt.aggregate.parallel import map_slices
from fedgpt.aggregate.refusals import ROBUST
from fedgpt.core.messages import Pacing, ServerState, Update

# elements of a product in float32: pieces of eight updates lie in the second-level cache
PIECE = 1 << 16


@dataclass(frozen=True)
class Krum(Strategy):
    """Withstands `attackers` that stand apart as a whole; clients whose text differs much look the
    same to it.
    """

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
        change = (
            f" or lower strategy.attackers to at most {most}"
            if most > 0
            else ", or take strategy=median"
        )
        yield from shortage(
            self, self.needed, pacing, f"strategy.attackers={self.attackers}", change
        )
        if self.keep > max(1, pacing.goal - self.attackers):
            yield (
                f"strategy.keep={self.keep} of {pacing.goal} updates would keep some of"
                f" strategy.attackers={self.attackers}: at most {pacing.goal - self.attackers} are"
                " allowed; lower it, or set 0 for that"
            )

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The mean of the updates kept, all with the same weight."""
        ordered = in_order(self, updates, self.needed)
        if not ordered:
            return np.zeros_like(state.params)
        most = len(ordered) - self.attackers  # where clients have failed `keep` may be more
        keep = min(self.keep or most, most)
        lowest = np.argsort(self.scores(ordered), kind="stable")[:keep]
        kept = [ordered[i] for i in sorted(lowest)]
        return middle(kept, 0, state.params)

    def scores(self, updates: Sequence[Update]) -> np.ndarray:
        """(updates,) float64: sums of squared distances to the nearest others; low is trusted."""
        gram = sum(map_slices(updates[0].delta.size, partial(_products, updates)))
        lengths = np.diag(gram)
        squares = np.maximum(lengths[:, None] + lengths - 2 * gram, 0.0)
        np.fill_diagonal(squares, 0.0)
        # column 0 is the update itself
        return np.sort(squares, axis=1)[:, 1 : len(updates) - self.attackers - 1].sum(axis=1)


def _products(updates: Sequence[Update], share: range) -> np.ndarray:
    """(updates, updates) float64: inner products over a part of the parameters."""
    import torch

    count = len(updates)
    gram, buffer = np.zeros((count, count)), torch.empty(count, min(PIECE, len(share)))
    for start in share[::PIECE]:
        stop = min(start + PIECE, share.stop)
        pieces = buffer[:, : stop - start]
        for row, update in zip(pieces.numpy(), updates, strict=True):
            np.copyto(row, update.delta[start:stop])
        gram += torch.mm(pieces, pieces.T).numpy()  # numpy's own is slow on so few and so long rows
    return gram
