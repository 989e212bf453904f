"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335): heavy-ball momentum at the server.

m <- mu m + D ; theta <- theta - eta m, m0 = 0. This is the sum form (torch.optim.SGD's): the gain
on a constant D tends to eta / (1 - mu). (The average form, m <- b m + (1 - b) D, has gain eta; it
is not used here.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import FRACTION, POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import MOMENTUM
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class FedAvgM(Strategy):
    """Federated averaging with momentum; remembers m.

    mu 0.9, the paper's, multiplies a steady update by 10 and needs many server steps or a smaller
    eta; the default multiplies by 2.
    """

    because = MOMENTUM

    eta: float = 1.0  # server learning rate
    mu: float = 0.5  # momentum; 0 is federated averaging

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, mu=FRACTION)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta m with m = mu m + D."""
        m = self.mu * state.memory.get("momentum", 0.0) + d
        return advance(state, state.params - self.eta * m, momentum=m)
