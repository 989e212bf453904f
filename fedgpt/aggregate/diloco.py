"""DiLoCo (Douillard et al. 2023, arXiv 2311.08105): Nesterov momentum on the averaged update.

m <- mu m + D ; theta <- theta - eta (D + mu m), m0 = 0: torch.optim.SGD(nesterov=True) on D. Step t
(from 1) on a constant D moves eta (1 - mu^(t+1)) / (1 - mu) times D: with mu 0.9 1.9 at first and
10 in the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import FRACTION, POSITIVE, Strategy, advance, check
from fedgpt.aggregate.refusals import MOMENTUM
from fedgpt.core.messages import ServerState


@dataclass(frozen=True)
class DiLoCo(Strategy):
    """Outer Nesterov over many local AdamW steps; remembers m.

    Defaults are the paper's, for hundreds of local steps and >= 50 server steps; try mu 0.5 to 0.6
    on shorter runs. Cohort pacing only: on every arrival the momentum compounds (4 equal updates
    move 12.1 D) and diverges.
    """

    because = MOMENTUM

    eta: float = 0.7  # server learning rate
    mu: float = 0.9  # momentum; 0 is federated averaging times eta

    def __post_init__(self) -> None:
        check(self, eta=POSITIVE, mu=FRACTION)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - eta (D + mu m) with m = mu m + D."""
        m = self.mu * state.memory.get("momentum", 0.0) + d
        return advance(state, state.params - self.eta * (d + self.mu * m), momentum=m)
