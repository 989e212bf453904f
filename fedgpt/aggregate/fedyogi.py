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

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.refusals import MOMENTS_NEED_COHORT
from fedgpt.core.messages import ServerState
from fedgpt.core.options.option import above, option, share


@dataclass(frozen=True)
class FedYogi(Strategy):
    """Adaptive server steps that grow again more slowly than FedAdam's; its memory is m and v."""

    refused_pacings = MOMENTS_NEED_COHORT

    eta: float = option(
        1e-3,
        "Server learning rate: about the largest change of one parameter in one step.",
        allowed=above(0),
    )
    beta1: float = option(0.9, "Decay of the running mean of updates.", allowed=share())
    beta2: float = option(
        0.99,
        "Decay of the running second moment of the updates; 1 - beta2 is its rate.",
        allowed=share(),
    )
    tau: float = option(
        1e-3,
        "Number that is added to the denominator: parameters whose updates are far smaller move"
        " little.",
        allowed=above(0),
    )

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
