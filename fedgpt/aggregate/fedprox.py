"""FedProx (Li et al. 2020, arXiv 1812.06127): clients stay close to the model they received.

The server averages as in federated averaging. A client minimises

    loss + (mu / 2) ||w - w_received||^2

with the SQUARED norm, so `mu (w - w_received)` is added to the gradient. It is added before
gradient clipping and AdamW, which rescales it like the rest of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.refusals import AVERAGE_NEEDS_COHORT
from fedgpt.core.options.option import at_least, option


@dataclass(frozen=True)
class FedProx(Strategy):
    """Federated averaging of clients with a proximal term; mu 0 gives federated averaging."""

    refused_pacings = AVERAGE_NEEDS_COHORT

    mu: float = option(
        0.01,
        "Strength of the proximal term, which pulls clients towards the model they received. 0 is"
        " federated averaging.",
        allowed=at_least(0),
    )

    def client_numbers(self) -> dict[str, float]:
        """`proximal_mu`: the factor on (w - w_received) in every local gradient."""
        return {"proximal_mu": float(self.mu)}
