"""The scores of a flat parameter vector on held-out text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgpt.core.device import Compute, free_memory, out_of_memory
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions
from fedgpt.core.score import number
from fedgpt.core.targets import calling, typed_class
from fedgpt.data.examples import Examples, counted, on_device
from fedgpt.evaluate.metrics.base import BatchMetric
from fedgpt.model.build import build_model
from fedgpt.tasks.base import Task

MOST_LOGITS = 1 << 26  # largest number of logits in a GPU's memory: 256 MB in float32
CPU_TOKENS = 512  # tokens per batch on a CPU, so that their logits fit the cache
GPU_TOKENS = 8192  # tokens per batch on a GPU, which clients use at the same time

log = logging.getLogger(__name__)


class HeldOut:
    """A separate model, and the examples on which it is scored.

    One pass over the examples gives the tallies of the task and of the metrics. Task and metrics
    compute their scores from the sums over all batches. A batch that does not fit into memory is
    halved, and so are all later ones.
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
        """The scores of `params`, (parameters,) float32, by name.

        Raises ConfigError where a class from outside does not give numbers, and FedGPTError if one
        example does not fit into memory.
        """
        self.load(params)
        # tallies stay on the device until the end, so that the host does not wait for every batch
        totals: dict[str, dict[str, Tensor]] = {"": {}}  # of the task, and of each metric by name
        totals |= {metric.name: {} for metric in self.metrics}
        start = 0
        while start < len(self.examples):
            rows = np.arange(start, min(start + self._batch_size, len(self.examples)))
            tallies = self._tallies_within_memory(rows)
            if tallies is None:
                self._halve()
                continue
            with calling("task", self.task, "tally"):
                _add(totals[""], tallies[""])
            for metric in self.metrics:
                with calling("metrics", metric, "tally"):
                    _add(totals[metric.name], tallies[metric.name])
            start += len(rows)
        return {**self._scores(totals[""]), **self._values(totals)}

    def _tallies_within_memory(self, rows: np.ndarray) -> dict[str, Mapping[str, Tensor]] | None:
        """The tallies of a batch of examples; None if the memory is too small for it."""
        try:
            return self._tallies(rows)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if self._batch_size == 1:
                raise FedGPTError(
                    f"the evaluation is out of memory ({self._working.device.type}) with a single"
                    f" example of model.block_size={self.model.options.block_size} tokens; lower"
                    " it, or make the model smaller"
                ) from error
        return None

    def _tallies(self, rows: np.ndarray) -> dict[str, Mapping[str, Tensor]]:
        """The tallies of the task, "", and of each metric by name, of a batch of examples."""
        batch = on_device(self.examples.take(rows), self._working.device)
        with calling("task", self.task, "forward"):
            outputs = self.task.forward(self.model, batch)
        found: dict[str, Mapping[str, Tensor]] = {}
        with calling("task", self.task, "tally"):
            found[""] = self.task.tally(outputs, batch, self._token_bytes)
        for metric in self.metrics:
            with calling("metrics", metric, "tally"):
                found[metric.name] = metric.tally(outputs, batch)
        return found

    def _halve(self) -> None:
        device, before = self._working.device.type, self._batch_size
        self._batch_size = -(-before // 2)
        free_memory(device)
        log.warning(
            "%d held-out examples do not fit into the memory (%s): they are scored %d at a time"
            " from now on, which gives the same scores, up to rounding",
            before,
            device,
            self._batch_size,
        )

    def _scores(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """The scores that the task names, and no other."""
        with calling("task", self.task, "tally"):
            numbers = {name: float(value) for name, value in totals.items()}
        with calling("task", self.task, "scores"):
            found = self.task.scores(numbers)
            missing = [name for name in self.task.scoring.names if name not in found]
        if missing:
            raise ConfigError(
                f"{typed_class('task', self.task)}: scores returned no {missing[0]!r}, which is"
                " among the names of its scoring; return every score that it names"
            )
        return {
            name: as_score("task", self.task, name, found[name]) for name in self.task.scoring.names
        }

    def _values(self, totals: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
        """The number of each metric."""
        found = {}
        for metric in self.metrics:
            with calling("metrics", metric, "tally"):
                numbers = {name: float(value) for name, value in totals[metric.name].items()}
            with calling("metrics", metric, "value"):
                value = metric.value(numbers)
            found[metric.name] = as_score("metrics", metric, metric.name, value)
        return found


def as_score(group: str, part: object, name: str, value: Any) -> float:
    """A score that a task or metric returned, as a number; raises ConfigError where it is none."""
    try:
        return number(value)
    except Exception as error:
        raise ConfigError(
            f"{typed_class(group, part)}: its {name!r} is {value!r:.60}; it must be one number"
        ) from error


def _add(totals: dict[str, Tensor], tally: Mapping[str, Tensor]) -> None:
    for name, value in tally.items():
        totals[name] = totals[name] + value if name in totals else value
