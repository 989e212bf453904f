"""Asynchronous delta-SGD (the rule without memory of Liu et al. 2024, arXiv 2401.09135).

Each arriving update is multiplied by 1 / k, so that k clients which reply equally often together
move the model by the mean of their updates:

    theta <- theta - eta sum_i s(tau_i) D_i / k

over the updates of one server step, with s the staleness discount. k is the constant pace.clients,
not the number of clients that are currently connected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.staleness import Discount, falling
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import above, option


@dataclass(frozen=True)
class DeltaSGD(Discount, Strategy):
    """The default rule of pace=buffer; it has no memory, such as momentum, to which stale updates
    are harmful.

    Under pace=cohort D is the uniform mean, except that k does not shrink when clients fail: the
    step is then smaller.
    """

    paces = frozenset({"cohort", "buffer"})

    staleness: str = falling("constant")
    eta: float = option(1.0, "Server learning rate: factor on the step.", allowed=above(0))

    def weight(self, update: Update, staleness: int) -> float:
        """s(tau), independent of the number of tokens."""
        return self.discount(staleness)

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """k; under pace=cohort the number of updates that a round waits for."""
        return float(pacing.goal if pacing.name == "cohort" else pacing.clients)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta D."""
        return advance(state, state.params - self.eta * d)
