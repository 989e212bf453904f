"""FedBuff (Nguyen et al. 2021, arXiv 2106.06639): a server step for every K buffered updates.

theta <- theta - eta (1 / K) sum_i s(tau_i) D_i, K = pace.goal: delta-SGD but for the divisor, which
is K, not the sum of s: a stale buffer takes a smaller step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.refusals import BUFFERED
from fedgpt.core.messages import Pacing


@dataclass(frozen=True)
class FedBuff(DeltaSGD):
    """Discounted mean of K updates, for pace=buffer; no memory, and no client weighs more than 1 /
    K (privacy).
    """

    paces = frozenset({"buffer"})
    because = BUFFERED

    staleness: str = "polynomial"  # constant, polynomial or hinge

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """K, or as many as there are, where a grace let more of them in."""
        return float(max(pacing.goal, len(weights)))
