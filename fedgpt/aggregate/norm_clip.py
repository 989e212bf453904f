"""Norm clipping (Sun et al. 2019, arXiv 1911.07963) at a norm that follows the clients'.

D = mean_i D_i min(1, C / ||D_i||), C = median of the last `window` norms of earlier versions; in
the first version, of the norms at hand. What counts is the norm as received, so C can grow as well
as shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import COUNT, Strategy, check
from fedgpt.aggregate.blocks import distances, in_order, ratio, weighted
from fedgpt.aggregate.refusals import ROBUST
from fedgpt.core.messages import ServerState, Update


@dataclass(frozen=True)
class NormClip(Strategy):
    """Bounds what a large update can do, at almost no cost; one of usual size and wrong direction
    passes.

    Remembers norms. Every client counts the same.
    """

    because = ROBUST

    window: int = 100  # updates whose norms are remembered

    def __post_init__(self) -> None:
        check(self, window=COUNT)

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """The mean of clipped updates."""
        ordered = in_order(self, updates)
        if not ordered:
            return np.zeros_like(state.params)
        norms = distances(ordered)
        clip = np.median(state.memory.get("norms", norms))
        return weighted(ordered, np.minimum(1, ratio(clip, norms)) / len(ordered), state.params)

    def remember(self, updates: Sequence[Update], state: ServerState) -> dict[str, np.ndarray]:
        """The last `window` norms, these included, but none of 0: a clip of 0 would let nothing
        through.
        """
        norms = distances(in_order(self, updates))
        recent = np.concatenate([state.memory.get("norms", np.zeros(0)), norms[norms > 0]])[
            -self.window :
        ]
        return {"norms": recent} if recent.size else {}
