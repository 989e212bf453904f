"""FedBuff (Nguyen et al. 2021, arXiv 2106.06639): a server step for every K buffered updates.

    theta <- theta - eta (1 / K) sum_i s(tau_i) D_i, K = pace.goal

This is delta-SGD with another divisor. It is K and not the sum of the s(tau_i), so a buffer of
stale updates takes a smaller step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.refusals import ARRIVALS_NEED_BUFFER
from fedgpt.aggregate.staleness import falling
from fedgpt.core.messages import Pacing


@dataclass(frozen=True)
class FedBuff(DeltaSGD):
    """Discounted mean of K updates, for pace=buffer; it has no memory.

    No update weighs more than 1 / K, which privacy=client needs.
    """

    paces = frozenset({"buffer"})
    refused_pacings = ARRIVALS_NEED_BUFFER

    staleness: str = falling("polynomial")

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """K, or the number of updates if more than K arrived during pace.grace."""
        return float(max(pacing.goal, len(weights)))
