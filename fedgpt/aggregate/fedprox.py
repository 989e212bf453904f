"""FedProx (Li et al. 2020, arXiv 1812.06127): clients are held near the model they received.

Client: loss + (mu / 2) ||w - w_received||^2, the SQUARED norm, so `mu (w - w_received)` is added to
the gradient before clipping and AdamW (coupled: Adam rescales the pull with the rest of the
gradient). The anchor is always the received vector. Server: federated averaging.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.aggregate.base import NOT_NEGATIVE, Strategy, check
from fedgpt.aggregate.refusals import AVERAGE


@dataclass(frozen=True)
class FedProx(Strategy):
    """Federated averaging of clients with a proximal term; mu 0 is federated averaging. No
    memory.
    """

    because = AVERAGE

    mu: float = 0.01  # strength of the pull to the received model, per unit of distance

    def __post_init__(self) -> None:
        check(self, mu=NOT_NEGATIVE)

    def client_numbers(self) -> dict[str, float]:
        """`proximal_mu`: the factor of (w - w_received) in every local gradient."""
        return {"proximal_mu": float(self.mu)}
