"""Multi-Krum (Blanchard et al. 2017, arXiv 1703.02757): keep the updates with close neighbours.

An attacker's update is assumed to be far from the honest ones. With n updates and f attackers

    score_i = sum of the n - f - 2 smallest ||D_i - D_j||^2 over the others
    D = mean of the m updates with the lowest scores

||a - b||^2 is computed as |a|^2 + |b|^2 - 2 a b, with products of pieces in float32 and their sums
in float64: the error is about 1e-7 of |a|^2 + |b|^2. Between models, whose norms are much larger
than their differences, that error would hide the differences (distances 5 times too large for
updates of norm 0.01); between updates it is negligible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import in_order, middle, shortage
from fedgpt.aggregate.parallel import map_slices
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import at_least, option

# elements of a product in float32: such pieces of eight updates fit in the second-level cache
PIECE = 1 << 16


@dataclass(frozen=True)
class Krum(Strategy):
    """Tolerates `attackers` whose updates are far from all others.

    It cannot distinguish them from honest clients whose text differs much from the others' text.
    """

    refused_pacings = COMPARISON_NEEDS_COHORT

    attackers: int = option(
        1,
        "Number of attackers that are tolerated. A cohort needs 2 * attackers + 3 clients.",
        unit="clients",
        allowed=at_least(1),
    )
    keep: int = option(
        0,
        "Number of updates that are averaged. 0: all but the attackers; 1: the original Krum.",
        unit="updates",
        allowed=at_least(0, zero="all but the attackers"),
    )

    @property
    def needed(self) -> int:
        """Smallest number of updates in a step: the paper's bound."""
        return 2 * self.attackers + 3

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """n >= 2 f + 3 must hold, and no attacker may be among the updates kept."""
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
        ordered = in_order(self, updates)
        if not ordered:
            return np.zeros_like(state.params)
        most = len(ordered) - self.attackers  # smaller than `keep` if clients have failed
        keep = min(self.keep or most, most)
        lowest = np.argsort(self.scores(ordered), kind="stable")[:keep]
        kept = [ordered[i] for i in sorted(lowest)]
        return middle(kept, 0, state.params)

    def scores(self, updates: Sequence[Update]) -> np.ndarray:
        """(updates,) float64: sums of squared distances to the nearest others; lower is better."""
        gram = sum(map_slices(updates[0].delta.size, partial(_products, updates)))
        lengths = np.diag(gram)
        squares = np.maximum(lengths[:, None] + lengths - 2 * gram, 0.0)
        np.fill_diagonal(squares, 0.0)
        # column 0 is the distance of each update to itself
        return np.sort(squares, axis=1)[:, 1 : len(updates) - self.attackers - 1].sum(axis=1)


def _products(updates: Sequence[Update], share: range) -> np.ndarray:
    """(updates, updates) float64: inner products over a slice of the parameters."""
    import torch

    count = len(updates)
    gram, buffer = np.zeros((count, count)), torch.empty(count, min(PIECE, len(share)))
    for start in share[::PIECE]:
        stop = min(start + PIECE, share.stop)
        pieces = buffer[:, : stop - start]
        for row, update in zip(pieces.numpy(), updates, strict=True):
            np.copyto(row, update.delta[start:stop])
        # torch, because numpy's product is slow on so few and so long rows
        gram += torch.mm(pieces, pieces.T).numpy()
    return gram
