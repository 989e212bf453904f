"""The scores of an evaluation: their names, and the score of the run.

Best weights, rollback, summary, figures and sweeps use the score of the run. The task chooses it
(tasks/base.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any


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
        """The worst possible value."""
        return -math.inf if self.higher_is_better else math.inf

    def better(self, new: float, old: float) -> bool:
        """Whether `new` is better than `old`; NaN is never better."""
        return new > old if self.higher_is_better else new < old

    def tolerated(self, best: float, share: float) -> float:
        """The value that is worse than `best` by `share` of its size.

        >>> Score("loss").tolerated(2.0, 0.5), Score("accuracy", True).tolerated(0.5, 0.5)
        (3.0, 0.25)
        """
        return best * (1 + (share if self.higher_is_better == (best < 0) else -share))

    def to_minimise(self, value: float) -> float:
        """`value` for a sweeper that minimises: negative where higher is better.

        >>> Score("loss").to_minimise(2.0), Score("accuracy", True).to_minimise(0.5)
        (2.0, -0.5)
        """
        return -value if self.higher_is_better else value


@dataclass(frozen=True)
class Scoring:
    """The names of all scores of an evaluation, and the score of the run.

    >>> scoring = Scoring(Score("loss"), ("loss", "perplexity"))
    >>> scoring.of({"version": 3, "tokens": 640, "loss": 0.0, "perplexity": 1.0})
    {'loss': 0.0, 'perplexity': 1.0}
    """

    score: Score
    names: tuple[str, ...]  # in the order of a table's columns; they include the score of the run

    def adding(self, names: Iterable[str]) -> Scoring:
        """A copy with the names of additional metrics."""
        return replace(self, names=(*self.names, *names))

    def of(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """The scores in a line of metrics.jsonl; empty if the version was not evaluated."""
        return {name: line[name] for name in self.names if name in line}

    def evaluated(self, lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The lines of metrics.jsonl that have scores."""
        return [line for line in lines if self.score.name in line]

    def best(self, lines: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The evaluated line with the best score, the earliest of equal scores; NaN only if all are
        NaN.

        >>> Scoring(Score("loss"), ("loss",)).best([{"loss": math.nan}, {"loss": 2.0}])
        {'loss': 2.0}
        """
        name = self.score.name
        best, *others = self.evaluated(lines)
        for line in others:
            if self.score.better(line[name], best[name]) or math.isnan(best[name]):
                best = line
        return best


LANGUAGE = Scoring(Score("loss"), ("loss", "perplexity", "bits_per_byte"))  # task=lm
