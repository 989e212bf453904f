"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): heavy-ball momentum at the server.

    m <- mu m + D ; theta <- theta - eta m, m0 = 0

This is the sum form of momentum, as in torch.optim.SGD: on a constant D a step approaches
eta / (1 - mu) times D. (The average form m <- b m + (1 - b) D approaches eta D; it is not used.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.refusals import MOMENTUM_NEEDS_COHORT
from fedgpt.core.messages import ServerState
from fedgpt.core.options.option import above, option, share


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """Federated averaging with momentum; its memory is m.

    The paper's mu of 0.9 multiplies a constant update by 10, so it needs many server steps or a
    smaller eta; the default multiplies it by 2.
    """

    refused_pacings = MOMENTUM_NEEDS_COHORT

    eta: float = option(1.0, "Server learning rate: factor on the step.", allowed=above(0))
    mu: float = option(0.5, "Momentum. 0 is federated averaging.", allowed=share())

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta m, after m <- mu m + D."""
        m = self.mu * state.memory.get("momentum", 0.0) + d
        return advance(state, state.params - self.eta * m, momentum=m)
