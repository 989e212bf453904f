"""The interface of a metric: an additional number besides the task's scores, chosen by
`metrics=`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedgpt.core.errors import ConfigError
from fedgpt.core.members import Members
from fedgpt.core.score import Scoring, name_problem
from fedgpt.core.targets import calling
from fedgpt.data.examples import Batch
from fedgpt.tasks.base import Sample


@dataclass(frozen=True)
class Metric(ABC):
    """The common part of both kinds of metric."""

    # in metrics.jsonl and summary.json; no name of another field (RESERVED in core/score.py)
    name: ClassVar[str]


@dataclass(frozen=True)
class BatchMetric(Metric):
    """A number computed from the same pass over the held-out text as the task's scores.

    Its options are its fields. Like a task it adds a tally of every batch, and computes its number
    from the totals. This metric is the share of targets that are among the `k` most likely tokens:

    >>> import torch
    >>> @dataclass(frozen=True)
    ... class TopAccuracy(BatchMetric):
    ...     name: ClassVar[str] = "top_accuracy"
    ...     k: int = 2
    ...     def tally(self, outputs, batch):
    ...         counted = batch[1] >= 0
    ...         found = (outputs.topk(self.k).indices == batch[1][..., None]).any(-1)
    ...         return {"hits": (found & counted).sum(), "count": counted.sum()}
    ...     def value(self, totals):
    ...         return totals["hits"] / totals["count"]
    >>> outputs = torch.tensor([[[0.1, 0.5, 0.4], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]]])
    >>> batch = (torch.tensor([[0, 1, 2]]), torch.tensor([[2, 0, -100]]))
    >>> metric = TopAccuracy()
    >>> {name: int(value) for name, value in metric.tally(outputs, batch).items()}
    {'hits': 1, 'count': 2}
    >>> metric.value({"hits": 1, "count": 2})
    0.5

    `fedgpt run metrics=[{_target_:mine.TopAccuracy,k:5}] trusted_packages=[mine]` adds it to
    metrics.jsonl, summary.json, the progress line and the report under its name.
    """

    @abstractmethod
    def tally(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Named 0-d tensors of one batch, which are added up over all batches.

        `outputs` is what the task's `forward` returned: (batch, time, vocabulary) of task=lm.
        """

    @abstractmethod
    def value(self, totals: Mapping[str, float]) -> float:
        """The number, from the tallies added up over the held-out text."""


@dataclass(frozen=True)
class SampleMetric(Metric):
    """A number computed from the text of a version, at the versions that generate text.

    >>> @dataclass(frozen=True)
    ... class Length(SampleMetric):
    ...     name: ClassVar[str] = "sample_length"
    ...     def value(self, sample):
    ...         return float(len(sample.written))
    >>> Length().value(Sample("Once", " upon a time"))
    12.0
    """

    @abstractmethod
    def value(self, sample: Sample) -> float:
        """The number."""


class _Members(Members[Metric]):
    """A metric is of one of two kinds."""

    @property
    def interface(self) -> tuple[type[Metric], ...]:
        return BatchMetric, SampleMetric


METRICS = _Members("metrics", "metrics", Metric)


def make_metrics(
    options: Iterable[Any], trusted: Iterable[str], scoring: Scoring
) -> list[BatchMetric | SampleMetric]:
    """The metrics that `options` names.

    An option is the name of a module of this folder or a mapping with `_target_` and fields.
    Raises ConfigError for an unknown one, for two numbers of one name, and for the name of another
    field of metrics.jsonl.
    """
    taken = dict.fromkeys(scoring.names, "the task has a score")
    metrics: list[BatchMetric | SampleMetric] = []
    problems: list[str] = []
    for name, metric in METRICS.build_list(options, trusted):
        assert isinstance(metric, BatchMetric | SampleMetric), "as the interface says"
        with calling("metrics", metric, "name"):
            own = metric.name
        if problem := name_problem(own):
            problems.append(f"metrics=[{name}]: {type(metric).__name__} {problem}")
        elif own in taken:
            problems.append(
                f"metrics=[{name}]: {taken[own]} of the name {own!r} already; leave one of them"
                " out, or give it another name"
            )
        else:
            taken[own] = "there is a metric"
            metrics.append(metric)
    if problems:
        raise ConfigError(problems)
    return metrics
