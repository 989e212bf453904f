"""FedAsync (Xie et al. 2019, arXiv 1903.03934): each arriving model is mixed into the server's.

    theta <- (1 - a) theta + a theta_i = theta - a (theta - base_i + D_i), a = alpha s(tau_i)

where base_i is the model from which client i started. The rule mixes models and not updates, so a
stale client also pulls theta back towards the old model that it started from. Clients add
(rho / 2) ||w - w_received||^2 to their loss (FedProx's term).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import parts
from fedgpt.aggregate.refusals import ARRIVALS_NEED_BUFFER
from fedgpt.aggregate.staleness import Discount
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import above, at_least, option


@dataclass(frozen=True)
class FedAsync(Discount, Strategy):
    """A baseline for pace=buffer with pace.goal=1; it has no memory."""

    paces = frozenset({"buffer"})
    refused_pacings = ARRIVALS_NEED_BUFFER
    needs_base = True

    alpha: float = option(
        0.6,
        "Share of an arriving model of staleness 0 in the next version.",
        allowed=above(0, most=1),
    )
    rho: float = option(
        0.005,
        "Strength of the proximal term, which pulls clients towards the model they received.",
        allowed=at_least(0),
    )

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """The rule is defined for one arrival at a time."""
        if pacing.goal != 1:
            yield (
                f"pace.goal={pacing.goal}: strategy=fedasync mixes every arrival in at once and"
                " allows pace.goal=1 only; set it, or take strategy=fedbuff"
            )

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """theta minus the mixed model; several updates are mixed one by one, in the given order."""
        shares = [self.alpha * self.discount(state.version - update.version) for update in updates]
        out = np.zeros_like(state.params)
        for part in parts(state.params.size):
            theta = state.params[part].astype(np.float64)
            moved = np.zeros_like(theta)  # summed separately, because theta would round the sum
            for share, update in zip(shares, updates, strict=True):
                assert update.base is not None, "the server attaches the base if needs_base"
                moved += share * (theta - moved - update.base[part] + update.delta[part])
            out[part] = moved
        return out

    def weight(self, update: Update, staleness: int) -> float:
        """The tokens: a number for the metrics, as `combine` does not use it."""
        return float(update.tokens)

    def client_numbers(self) -> dict[str, float]:
        """`proximal_mu`: the factor on (w - w_received) in every local gradient."""
        return {"proximal_mu": float(self.rho)}
