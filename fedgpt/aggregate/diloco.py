"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): Nesterov momentum on the averaged update.

The server treats D like a gradient and applies torch.optim.SGD(nesterov=True) to it:

    m <- mu m + D ; theta <- theta - eta (D + mu m), m0 = 0

On a constant D, step t (counted from 1) moves the model by eta (1 - mu^(t+1)) / (1 - mu) times D:
with eta 1 and mu 0.9 that is 1.9 D in the first step and approaches 10 D.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.refusals import MOMENTUM_NEEDS_COHORT
from fedgpt.core.messages import ServerState
from fedgpt.core.options.option import above, option, share


@dataclass(frozen=True)
class DiLoCo(Strategy):
    """Nesterov momentum at the server, over many local AdamW steps; its memory is m.

    The defaults are the paper's, for hundreds of local steps and at least 50 server steps; try mu
    0.5 to 0.6 in shorter runs. Only pace=cohort is allowed: applied on every arrival, the momentum
    compounds (4 equal updates move the model by 12.1 D) and diverges.
    """

    refused_pacings = MOMENTUM_NEEDS_COHORT

    eta: float = option(0.7, "Server learning rate: factor on the step.", allowed=above(0))
    mu: float = option(
        0.9,
        "Momentum. 0.5 is better for short runs; 0 is federated averaging with the server learning"
        " rate eta.",
        allowed=share(),
    )

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta (D + mu m), after m <- mu m + D."""
        m = self.mu * state.memory.get("momentum", 0.0) + d
        return advance(state, state.params - self.eta * (d + self.mu * m), momentum=m)
