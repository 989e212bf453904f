"""FLTrust (Cao et al. 2020, arXiv 2012.13995): clients count as far as they agree with an update of
the server's own.

With g = the server's D, trained on public text: t_i = max(0, cos(D_i, g)); D = sum_i t_i (||g|| /
||D_i||) D_i / sum_i t_i. Where nobody agrees, all t_i = 0, nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import blocks, distances, in_order, ratio, weighted
from fedgpt.aggregate.refusals import ROBUST
from fedgpt.core.messages import ServerState, Update


@dataclass(frozen=True)
class FLTrust(Strategy):
    """Withstands any number of attackers, if the public text resembles the clients'; costs one
    training job a version.

    The step is never larger than the server's own.
    """

    because = ROBUST
    needs_root = True

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """Updates scaled to the server's norm, weighted by trust."""
        assert root is not None, "the engine trains the root update where needs_root"
        ordered = in_order(self, updates)
        norms, (own,) = distances(ordered), distances([root])
        dots = np.zeros(len(ordered))
        for part, block in blocks(ordered):
            dots += block @ root.delta[part].astype(np.float64)
        trust = np.maximum(0, ratio(ratio(dots, norms), np.asarray(own)))
        return weighted(ordered, ratio(ratio(trust, trust.sum()) * own, norms), state.params)
