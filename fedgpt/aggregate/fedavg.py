"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629): theta <- theta - eta sum_i w_i
D_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import AVERAGE
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Mean of the clients' models, weighted by tokens trained; eta 1 lands exactly on that mean. No
    memory.
    """

    because = AVERAGE

    eta: float = 1.0  # server learning rate, a factor on the mean update

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta D."""
        return advance(state, state.params - self.eta * d)
