"""The one number that a run is judged by: best weights, rollback, figures and sweeps go by it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A name among the scores of an evaluation, and its direction.

    >>> Score("loss").better(2.0, 3.0), Score("accuracy", higher_is_better=True).better(0.5, 0.6)
    (True, False)
    """

    name: str
    higher_is_better: bool = False

    @property
    def worst(self) -> float:
        """The value that every other one is better than."""
        return -math.inf if self.higher_is_better else math.inf

    def better(self, new: float, old: float) -> bool:
        """Whether `new` is better than `old`; NaN is never better."""
        return new > old if self.higher_is_better else new < old
