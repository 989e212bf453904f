"""The scores of an evaluation: their names, and the score of the run.

Best weights, rollback, summary, figures and sweeps use the score of the run. The task chooses it
(tasks/base.py). Scores and metrics are in the same lines of metrics.jsonl as the fields in
RESERVED, so their names must be different.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# every field of a line of metrics.jsonl, and of an entry of summary.json, that is not a score
RESERVED = frozenset(
    (
        # where the run stands (server/metrics_line.py, loop.py)
        *("version", "tokens", "wall_seconds", "virtual_seconds", "bytes_up", "bytes_down"),
        *("quarantined", "restored", "pacing", "in_flight", "bases"),
        # the updates of the version, and its step (server/metrics_line.py, diagnostics.py)
        *("accepted", "rejected", "clipped", "staleness", "train_loss", "lr", "update_norm"),
        *("compress_error", "residual_norm", "update_tokens", "mean_weight", "state_lost"),
        *("step_norm", "cosine", "step_correlation", "tokens_by_client", "idle_share"),
        "micro_batch",
        # what privacy has cost (server/privacy.py)
        *("epsilon", "privacy_clip"),
        # the text that the model wrote (evaluate/central.py)
        *("prompt", "sample"),
    )
)


def name_problem(name: Any) -> str:
    """What is wrong with the name of a score or metric; empty where nothing is.

    >>> name_problem("epsilon")
    "is named 'epsilon', as a field of every line of metrics.jsonl; give it another name"
    >>> name_problem("")
    "is named ''; its name must be a text that is not empty"
    """
    if not isinstance(name, str) or not name.strip():
        return f"is named {name!r}; its name must be a text that is not empty"
    if name in RESERVED:
        return f"is named {name!r}, as a field of every line of metrics.jsonl; give it another name"
    return ""


def number(value: Any) -> float:
    """A score as a number of Python: of a number, or a tensor or array of one element.

    Raises TypeError or ValueError for anything else.

    >>> import numpy as np
    >>> number(2), number(np.float32(0.5))
    (2, 0.5)
    >>> number("high")
    Traceback (most recent call last):
    ...
    TypeError: 'high' is no number
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{value!r:.60} is no number")
    return float(value)


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

    @property
    def problem(self) -> str:
        """What is wrong with the names; empty where nothing is.

        >>> Scoring(Score("loss"), ("loss", "version")).problem.partition(",")[0]
        "one of its scores is named 'version'"
        """
        names = self.names if isinstance(self.names, list | tuple) else ()
        if not isinstance(self.score, Score) or self.score.name not in names:
            return f"its score {self.score!r} is not among its names {self.names!r}; add it to them"
        if twice := [name for name in names if names.count(name) > 1]:
            return f"two of its scores are named {twice[0]!r}; give one another name"
        wrong = next((problem for name in names if (problem := name_problem(name))), "")
        return f"one of its scores {wrong}" if wrong else ""

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
