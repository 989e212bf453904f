"""Metrics of updates that the server has freed: cosines between updates, and between consecutive
server steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedgpt.core.messages import Update
from fedgpt.server.count_sketch import Sketch, cosine, mean_pairwise_cosine

WINDOW = 8  # newest updates that are compared under pace=buffer, where a step may have only one


class Diagnostics:
    """Sketches of the current updates and of the last server step."""

    def __init__(self, size: int, extra: Mapping[str, np.ndarray]):
        """`extra` contains the arrays that an earlier `memory` returned."""
        self._sketch = Sketch(size)
        self._updates: list[tuple[tuple[str, int], np.ndarray]] = []
        self._recent = list(extra["sketch/updates"]) if "sketch/updates" in extra else []
        self._last_step = extra.get("sketch/step")

    def update(self, update: Update, keeps_jobs: bool) -> None:
        """Add an accepted update; with `keeps_jobs` it is also compared with updates of earlier
        versions.
        """
        sketch = self._sketch.of(update.delta)
        if keeps_jobs:
            self._recent = [*self._recent, sketch][-WINDOW:]
        else:
            self._updates.append(((update.client, update.number), sketch))

    def step(self, step: np.ndarray) -> dict[str, float | None]:
        """The metrics of a server step: its norm, the mean cosine over pairs of updates (`cosine`),
        and the cosine between this server step and the last one (`step_correlation`).
        """
        # sorted, so that the bits do not depend on the order of arrival
        by_client = sorted(self._updates, key=lambda pair: pair[0])
        in_order = [sketch for _, sketch in by_client]
        mean = mean_pairwise_cosine(in_order or self._recent)
        sketch = self._sketch.of(step)
        lag = None if self._last_step is None else cosine(sketch, self._last_step)
        self._updates, self._last_step = [], sketch
        return {"step_norm": float(np.linalg.norm(step)), "cosine": mean, "step_correlation": lag}

    def memory(self) -> dict[str, np.ndarray]:
        """The arrays for a checkpoint, so that a resumed run logs the same metrics."""
        kept = {} if self._last_step is None else {"sketch/step": self._last_step}
        return {**kept, "sketch/updates": np.array(self._recent)} if self._recent else kept
