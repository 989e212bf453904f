"""FedBuff (Nguyen et al. 2021, arXiv 2106.06639): a server step for every K buffered updates.

theta <- theta - eta (1 / K) sum_i s(tau_i) D_i, K = pace.goal. The divisor is K, not the sum of s: a stale buffer takes
a smaller step, and so does one that a timer closed early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import BUFFERED
from fedgpt.aggregate.staleness import RANGES, Discount
from fedgpt.core.messages import Pacing, ServerState, Update


@dataclass(frozen=True)
class FedBuff(Discount, Strategy):
    """Discounted mean of K updates, for pace=buffer; no memory, and no client weighs more than 1 / K (privacy)."""

    paces = frozenset({"buffer"})
    because = BUFFERED

    eta: float = 1.0  # server learning rate

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, **RANGES)

    def weight(self, update: Update, staleness: int) -> float:
        """s(tau); tokens do not count."""
        return self.discount(staleness)

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """K."""
        return float(pacing.goal)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta D."""
        return advance(state, state.params - self.eta * d)
