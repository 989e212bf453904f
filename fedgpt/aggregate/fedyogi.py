"""FedYogi (Reddi et al. 2021, arXiv 2003.00295): FedAdam whose v moves by a bounded amount.

m <- b1 m + (1 - b1) D ; v <- v - (1 - b2) D^2 sign(v - D^2) ; theta <- theta - eta m / (sqrt(v) +
tau), m0 = 0, v0 = tau^2, no bias correction. v forgets large updates additively, not geometrically,
so rare large D are followed by smaller steps for longer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import FRACTION, POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import ADAPTIVE
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class FedYogi(Strategy):
    """Adaptive server steps, slower to grow again than FedAdam's; remembers m and v."""

    because = ADAPTIVE

    eta: float = 1e-3  # about the largest change of one weight in one step
    beta1: float = 0.9  # decay of m
    beta2: float = 0.99  # 1 - beta2 is the rate of v
    tau: float = 1e-3  # floor of sqrt(v): coordinates with |D| far below it move little

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, beta1=FRACTION, beta2=FRACTION, tau=POSITIVE)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta m / (sqrt(v) + tau)."""
        m = state.memory.get("momentum", 0.0)
        v = state.memory.get("second_moment", self.tau**2)
        m = self.beta1 * m + (1 - self.beta1) * d
        # stays >= 0: D^2 is subtracted only where v is above it
        v = v - (1 - self.beta2) * d**2 * np.sign(v - d**2)
        return advance(
            state,
            state.params - self.eta * m / (np.sqrt(v) + self.tau),
            momentum=m,
            second_moment=v,
        )
