"""A task and metrics as a user would write them: classify the label of a document.

Used by `task=custom task._target_=support.labels_task.DocumentLabel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedgpt.core.score import Score, Scoring
from fedgpt.data.batches import IGNORE
from fedgpt.data.examples import Batch
from fedgpt.evaluate.metrics.base import BatchMetric, SampleMetric
from fedgpt.tasks.base import Sample, Task


@dataclass(frozen=True)
class DocumentLabel(Task):
    """After the last token of a document's beginning, output i stands for label i."""

    labels: tuple[str, ...] = ("ann", "bob")
    length: int = 12  # number of tokens of a document that are read

    scoring: ClassVar[Scoring] = Scoring(Score("right", higher_is_better=True), ("right", "nats"))

    def examples(
        self, tokens: np.ndarray, label: str, block_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        inputs = tokens[: min(self.length, block_size)].astype(np.int64)
        targets = np.full(len(inputs), IGNORE, np.int64)
        targets[-1] = self.labels.index(label)
        yield inputs, targets

    def tally(self, outputs: Tensor, batch: Batch, token_bytes: Tensor | None) -> dict[str, Tensor]:
        best = outputs[..., : len(self.labels)].argmax(-1)
        right = ((best == batch[1]) & (batch[1] != IGNORE)).sum()
        return {**super().tally(outputs, batch, token_bytes), "right": right}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        count = totals["tokens"]
        return {"right": totals["right"] / count, "nats": totals["nats"] / count}


@dataclass(frozen=True)
class TopTokens(BatchMetric):
    """How often the correct target is among the `k` largest outputs."""

    name: ClassVar[str] = "top_tokens"
    k: int = 2

    def tally(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        counted = batch[1] != IGNORE
        found = (outputs.topk(self.k).indices == batch[1][..., None]).any(-1)
        return {"hits": (found & counted).sum(), "all": counted.sum()}

    def value(self, totals: Mapping[str, float]) -> float:
        return totals["hits"] / totals["all"]


@dataclass(frozen=True)
class SampleLength(SampleMetric):
    """The number of characters of a sample."""

    name: ClassVar[str] = "sample_length"

    def value(self, sample: Sample) -> float:
        return float(len(sample.written))
