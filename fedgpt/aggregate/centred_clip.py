"""Centred clipping (Karimireddy et al. 2020, arXiv 2012.10333): clip around the last aggregate.

Clipping an update's norm stops long updates. Clipping its distance to the last aggregate v also
stops updates of usual length that point elsewhere. Starting from v = the last D (0 at first),
`passes` times

    v <- v + mean_i (D_i - v) min(1, tau / ||D_i - v||)

and D = v. An attacker moves v by at most tau / n in a pass. tau = 0 takes the median of the
||D_i - v|| in each pass: a fixed number fits one model, learning rate and number of local steps
only, and the median follows the honest clients as long as they are more than half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.blocks import distances, in_order, ratio, weighted
from fedgpt.aggregate.refusals import COMPARISON_NEEDS_COHORT
from fedgpt.core.messages import ServerState, Update
from fedgpt.core.options.option import at_least, option


@dataclass(frozen=True)
class CentredClip(Strategy):
    """Norm clipping around the last aggregate; its memory is v."""

    refused_pacings = COMPARISON_NEEDS_COHORT

    tau: float = option(
        0.0,
        "Radius of the clip. 0 takes the median distance of the updates to the last aggregate.",
        allowed=at_least(0, zero="the median distance"),
    )
    passes: int = option(
        5,
        "Repetitions of the clip in a server step, each around the result of the one before.",
        unit="passes",
        allowed=at_least(1, end=10_000),
    )

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """v after the passes."""
        ordered = in_order(self, updates)
        if not ordered:
            return np.zeros_like(state.params)
        v = state.memory.get("centre", np.zeros_like(state.params))
        for _ in range(self.passes):
            away = distances(ordered, v)
            share = np.minimum(1, ratio(self.tau or np.median(away), away))
            v = float(1 - share.mean()) * v + weighted(ordered, share / len(ordered), state.params)
        return v

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """theta - D; D becomes v, unless no update arrived or all were zero."""
        return advance(state, state.params - d, **({"centre": d} if d.any() else {}))
