"""Asynchronous delta-SGD (the memoryless rule of Liu et al. 2024, arXiv 2401.09135): an arrival
moves 1 / k of itself.

theta <- theta - eta sum_i s(tau_i) D_i / k over the updates of one server step, k = clients that
train at once. k is a constant, not the number that happens to be alive: pace.clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import POSITIVE, Strategy, advance, check
from fedgpt.aggregate.staleness import RANGES, Discount
from fedgpt.core.messages import Pacing, ServerState, Update


@dataclass(frozen=True)
class DeltaSGD(Discount, Strategy):
    """The default of pace=buffer: no memory, so nothing that staleness could spoil.

    Under pace=cohort it is the uniform mean, but for clients that fail: k stays, so the step is
    smaller without them.
    """

    paces = frozenset({"cohort", "buffer"})

    staleness: str = "constant"  # constant, polynomial or hinge
    eta: float = 1.0  # server learning rate

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, **RANGES)

    def weight(self, update: Update, staleness: int) -> float:
        """s(tau); tokens do not count."""
        return self.discount(staleness)

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """k; in a cohort that closes at a goal, the goal."""
        return float(pacing.goal if pacing.name == "cohort" else pacing.clients)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta D."""
        return advance(state, state.params - self.eta * d)
