"""FedAdam (Reddi et al. 2021, arXiv 2003.00295): Adam at the server, in the paper's form.

The server treats D like a gradient and keeps running means of D and of D^2, as Adam does:

    m <- b1 m + (1 - b1) D ; v <- b2 v + (1 - b2) D^2 ; theta <- theta - eta m / (sqrt(v) + tau)

with m0 = 0, v0 = tau^2 and no bias correction. eta is an absolute step for each weight. It is small
because the weights of a GPT are drawn with a standard deviation of 0.02.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import FRACTION, POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import MOMENTS_NEED_COHORT
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class FedAdam(Strategy):
    """Adaptive server steps; its memory is m and v."""

    refused_pacings = MOMENTS_NEED_COHORT

    eta: float = 1e-3  # server learning rate, about the largest change of a weight in one step
    beta1: float = 0.9  # decay of m
    beta2: float = 0.99  # decay of v
    tau: float = 1e-3  # added to sqrt(v): coordinates with |D| far below tau move little

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, beta1=FRACTION, beta2=FRACTION, tau=POSITIVE)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta m / (sqrt(v) + tau), after m and v have moved."""
        m = state.memory.get("momentum", 0.0)
        v = state.memory.get("second_moment", self.tau**2)
        m = self.beta1 * m + (1 - self.beta1) * d
        v = self.beta2 * v + (1 - self.beta2) * d**2  # the square of D, not of m
        return advance(
            state,
            state.params - self.eta * m / (np.sqrt(v) + self.tau),
            momentum=m,
            second_moment=v,
        )
