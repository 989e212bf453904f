"""Federated averaging (McMahan et al. 2017, arXiv 1602.05629): the mean of the clients' models.

theta <- theta - eta D, D = sum_i w_i D_i / sum_i w_i, with w_i the tokens that client i trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.refusals import AVERAGE_NEEDS_COHORT
from fedgpt.core.messages import ServerState
from fedgpt.core.options.option import above, option


@dataclass(frozen=True)
class FedAvg(Strategy):
    """The mean of the clients' models, weighted by tokens; eta 1 gives exactly that mean."""

    refused_pacings = AVERAGE_NEEDS_COHORT

    eta: float = option(1.0, "Server learning rate: factor on the step.", allowed=above(0))

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta D."""
        return advance(state, state.params - self.eta * d)
