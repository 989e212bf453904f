"""FLTrust (Cao et al. 2020, arXiv 2012.13995): clients are compared with the server's own update.

In every version the server trains an update g itself, on public text. A client's trust t_i is the
cosine of its update with g; all updates are scaled to the norm of g:

    t_i = max(0, cos(D_i, g)) ; D = sum_i t_i (||g|| / ||D_i||) D_i / sum_i t_i

If no client agrees with g, all t_i are 0 and the model does not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import blocks, distances, in_order, ratio, weighted
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import ServerState, Update


@dataclass(frozen=True)
class FLTrust(Strategy):
    """Tolerates any number of attackers, if the public text resembles the clients' texts.

    It costs one training job per version. The step is never longer than the server's own update.
    """

    refused_pacings = COMPARISON_NEEDS_COHORT
    needs_root = True

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The mean of the updates, scaled to the norm of g and weighted by trust."""
        assert root is not None, "the server trains the root update if needs_root"
        ordered = in_order(self, updates)
        norms, (own,) = distances(ordered), distances([root])
        dots = np.zeros(len(ordered))
        for part, block in blocks(ordered):
            dots += block @ root.delta[part].astype(np.float64)
        trust = np.maximum(0, ratio(ratio(dots, norms), np.asarray(own)))
        return weighted(ordered, ratio(ratio(trust, trust.sum()) * own, norms), state.params)
