"""Accuracy: the share of targets for which the most likely token is correct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedgpt.data.batches import IGNORE
from fedgpt.data.examples import Batch, counted
from fedgpt.evaluate.metrics.base import BatchMetric


@dataclass(frozen=True)
class Accuracy(BatchMetric):
    """The share of the counted targets that have the largest output; higher is better."""

    name: ClassVar[str] = "accuracy"

    def tally(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Number of correct predictions and of all predictions."""
        right = (outputs.argmax(-1) == batch[1]) & (batch[1] != IGNORE)
        return {"right": right.sum(), "count": counted(batch)}

    def value(self, totals: Mapping[str, float]) -> float:
        """The share, from 0 to 1."""
        return totals["right"] / totals["count"]
