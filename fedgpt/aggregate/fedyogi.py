"""FedYogi (Reddi et al. 2021, arXiv 2003.00295): FedAdam whose v moves by a bounded amount.

FedAdam's v decays geometrically after a large D. Here it moves by at most (1 - b2) D^2 in a step,
so after a rare large D the steps stay small for longer:

    m <- b1 m + (1 - b1) D ; v <- v - (1 - b2) D^2 sign(v - D^2) ;
    theta <- theta - eta m / (sqrt(v) + tau)

with m0 = 0, v0 = tau^2 and no bias correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import FRACTION, POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import MOMENTS_NEED_COHORT
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class FedYogi(Strategy):
    """Adaptive server steps that grow again more slowly than FedAdam's; its memory is m and v."""

    refused_pacings = MOMENTS_NEED_COHORT

    eta: float = 1e-3  # server learning rate, about the largest change of a weight in one step
    beta1: float = 0.9  # decay of m
    beta2: float = 0.99  # decay of v: 1 - beta2 is its rate
    tau: float = 1e-3  # added to sqrt(v): coordinates with |D| far below tau move little

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, beta1=FRACTION, beta2=FRACTION, tau=POSITIVE)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta m / (sqrt(v) + tau), after m and v have moved."""
        m = state.memory.get("momentum", 0.0)
        v = state.memory.get("second_moment", self.tau**2)
        m = self.beta1 * m + (1 - self.beta1) * d
        # v stays >= 0, because D^2 is subtracted only where v is larger
        v = v - (1 - self.beta2) * d**2 * np.sign(v - d**2)
        return advance(
            state,
            state.params - self.eta * m / (np.sqrt(v) + self.tau),
            momentum=m,
            second_moment=v,
        )
