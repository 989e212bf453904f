"""FedProx (Li et al. 2020, arXiv 1812.06127): clients stay close to the model they received.

The server averages as in federated averaging. A client minimises

    loss + (mu / 2) ||w - w_received||^2

with the SQUARED norm, so `mu (w - w_received)` is added to the gradient. It is added before
gradient clipping and AdamW, which rescales it like the rest of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.aggregate.base import NOT_NEGATIVE, Strategy, check
from fedgpt.aggregate.refusals import AVERAGE_NEEDS_COHORT


@dataclass(frozen=True)
class FedProx(Strategy):
    """Federated averaging of clients with a proximal term; mu 0 gives federated averaging."""

    refused_pacings = AVERAGE_NEEDS_COHORT

    mu: float = 0.01  # strength of the proximal term

    def __post_init__(self) -> None:
        check(self, mu=NOT_NEGATIVE)

    def client_numbers(self) -> dict[str, float]:
        """`proximal_mu`: the factor on (w - w_received) in every local gradient."""
        return {"proximal_mu": float(self.mu)}
