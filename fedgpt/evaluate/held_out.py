"""The scores of a flat parameter vector on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedgpt.core.device import Compute
from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions
from fedgpt.data.examples import Examples, counted, on_device
from fedgpt.evaluate.metrics.base import BatchMetric
from fedgpt.model.build import build_model
from fedgpt.tasks.base import Task

MOST_LOGITS = 1 << 26  # largest number of logits in a GPU's memory: 256 MB in float32
CPU_TOKENS = 512  # tokens per batch on a CPU, so that their logits fit the cache
GPU_TOKENS = 8192  # tokens per batch on a GPU, which clients use at the same time


class HeldOut:
    """A separate model, and the examples on which it is scored.

    One pass over the examples gives the tallies of the task and of the metrics. Task and metrics
    compute their scores from the sums over all batches.
    """

    def __init__(  # noqa: PLR0913  # one for each part of an evaluation
        self,
        model: ModelOptions,
        examples: Examples,
        token_bytes: np.ndarray,
        compute: Compute,
        task: Task,
        metrics: Sequence[BatchMetric] = (),
        base: Mapping[str, torch.Tensor] | None = None,
    ):
        """`token_bytes`, (vocabulary,): bytes of text of each token.

        `base` contains the frozen weights, if there are any.
        """
        self.model = build_model(model, len(token_bytes), base).eval()
        self.model.to(compute.device, compute.torch_dtype)
        self.layout, self._working = flatten(self.model)
        self.examples, self.task, self.metrics = examples, task, metrics
        self.tokens = int(counted(examples.rows))  # number of targets that are scored
        self._token_bytes = torch.as_tensor(token_bytes).to(compute.device, torch.int64)
        at_once = (
            CPU_TOKENS
            if compute.device == "cpu"
            else min(GPU_TOKENS, MOST_LOGITS // len(token_bytes))
        )
        self._batch_size = max(1, at_once // model.block_size)

    def load(self, params: np.ndarray) -> None:
        """Put a flat vector, (parameters,) float32, into the evaluation's model."""
        host = torch.empty(params.size)
        np.copyto(host.numpy(), params)
        self._working.copy_(host)

    @torch.inference_mode()
    def __call__(self, params: np.ndarray) -> dict[str, float]:
        """The scores of `params`, (parameters,) float32, by name."""
        self.load(params)
        device = self._working.device
        # tallies stay on the device until the end, so that the host does not wait for every batch
        totals: dict[tuple[str, str], Tensor] = {}
        for start in range(0, len(self.examples), self._batch_size):
            rows = np.arange(start, min(start + self._batch_size, len(self.examples)))
            batch = on_device(self.examples.take(rows), device)
            outputs = self.task.forward(self.model, batch)
            tallies = {"": self.task.tally(outputs, batch, self._token_bytes)}
            tallies |= {metric.name: metric.tally(outputs, batch) for metric in self.metrics}
            for owner, tally in tallies.items():
                for name, value in tally.items():
                    key = owner, name
                    totals[key] = totals[key] + value if key in totals else value
        numbers = {key: float(value) for key, value in totals.items()}
        scores = self.task.scores(_owned(numbers, ""))
        for metric in self.metrics:
            scores[metric.name] = metric.value(_owned(numbers, metric.name))
        return scores


def _owned(totals: dict[tuple[str, str], float], owner: str) -> dict[str, float]:
    return {name: value for (whose, name), value in totals.items() if whose == owner}
