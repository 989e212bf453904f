"""Norm clipping (Sun et al. 2019, arXiv 1911.07963) at a limit C that follows the clients' norms.

    D = mean_i D_i min(1, C / ||D_i||)

C is the median of the last `window` norms of earlier versions; in the first version, of that
version's own norms. The norms are stored before clipping, so C can grow as well as shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.blocks import distances, in_order, ratio, weighted
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import ServerState, Update
from fedgpt.core.options.option import at_least, option


@dataclass(frozen=True)
class NormClip(Strategy):
    """Bounds the effect of a long update, at almost no cost; stores norms.

    An update of usual length in a wrong direction is not affected. All clients have the same
    weight.
    """

    refused_pacings = COMPARISON_NEEDS_COHORT

    window: int = option(
        100,
        "Number of recent norms over which the median is computed.",
        unit="updates",
        allowed=at_least(1, end=10**6),
    )

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The mean of the clipped updates."""
        ordered = in_order(self, updates)
        if not ordered:
            return np.zeros_like(state.params)
        norms = distances(ordered)
        clip = np.median(state.memory.get("norms", norms))
        return weighted(ordered, np.minimum(1, ratio(clip, norms)) / len(ordered), state.params)

    def remember(self, updates: Sequence[Update], state: ServerState) -> dict[str, np.ndarray]:
        """The last `window` norms above 0, including this version's.

        Norms of 0 are excluded, because a limit of 0 would stop all further learning.
        """
        norms = distances(in_order(self, updates))
        all_norms = np.concatenate([state.memory.get("norms", np.zeros(0)), norms[norms > 0]])
        recent = all_norms[-self.window :]
        return {"norms": recent} if recent.size else {}
