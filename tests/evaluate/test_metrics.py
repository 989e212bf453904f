"""Properties of every metric, and values of the built-in ones computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.labels_task import SampleLength, TopTokens

from fedgpt.core.score import LANGUAGE
from fedgpt.data.batches import IGNORE
from fedgpt.evaluate.metrics.accuracy import Accuracy
from fedgpt.evaluate.metrics.base import METRICS, BatchMetric, SampleMetric, make_metrics
from fedgpt.tasks.base import Sample

OWN = {name: make_metrics([name], (), LANGUAGE)[0] for name in METRICS.names()}
MEMBERS: dict[str, Any] = {**OWN, "top tokens": TopTokens(k=3), "length": SampleLength()}
GENERATOR = torch.Generator().manual_seed(0)
BATCH = (
    torch.zeros(6, 5, dtype=torch.int64),
    torch.randint(8, (6, 5), generator=GENERATOR),
)
BATCH[1][2:4, 1:] = IGNORE
OUTPUTS = torch.randn(6, 5, 8, generator=GENERATOR)


def value(metric: BatchMetric, outputs: torch.Tensor, *parts: slice) -> float:
    totals: dict[str, float] = {}
    for part in parts or (slice(None),):
        batch = tuple(tensor[part] for tensor in BATCH)
        for name, number in metric.tally(outputs[part], batch).items():
            totals[name] = totals.get(name, 0.0) + float(number)
    return metric.value(totals)


of_batches = pytest.mark.parametrize(
    "metric", [m for m in MEMBERS.values() if isinstance(m, BatchMetric)], ids=lambda m: m.name
)


@of_batches
def test_a_metric_does_not_depend_on_the_batches(metric):
    at_once = value(metric, OUTPUTS)
    assert math.isfinite(at_once)
    assert value(metric, OUTPUTS, slice(0, 1), slice(1, 4), slice(4, 6)) == pytest.approx(at_once)


@of_batches
def test_outputs_at_ignored_targets_have_no_effect(metric):
    other = OUTPUTS.clone()
    other[BATCH[1] == IGNORE] = torch.randn(int((BATCH[1] == IGNORE).sum()), 8)
    assert value(metric, other) == value(metric, OUTPUTS)


@pytest.mark.parametrize(
    "metric", [m for m in MEMBERS.values() if isinstance(m, SampleMetric)], ids=lambda m: m.name
)
def test_a_sample_metric_is_finite_even_for_an_empty_sample(metric):
    assert math.isfinite(metric.value(Sample("Once", "")))
    assert math.isfinite(metric.value(Sample("", " upon a time")))


def test_metrics_have_different_names():
    names = [metric.name for metric in MEMBERS.values()]
    assert len(set(names)) == len(names) and not set(names) & set(LANGUAGE.names)
    assert all(name.isidentifier() for name in names)
    assert all(metric.name == name for name, metric in OWN.items())


def test_accuracy_by_hand():
    outputs = torch.tensor([[[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]])
    batch = (torch.zeros(1, 3), torch.tensor([[1, 1, IGNORE]]))
    tally = Accuracy().tally(outputs, batch)
    assert {name: int(number) for name, number in tally.items()} == {"right": 1, "count": 2}
    assert Accuracy().value({"right": 1, "count": 2}) == 0.5
