"""The central evaluation of a run: what the server adds to the line of an evaluated version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedgpt.core.device import Compute
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.core.targets import calling, typed_class
from fedgpt.data.corpus import corpus_prompt
from fedgpt.data.examples import Examples
from fedgpt.data.prepare import HELD_OUT, Prepared
from fedgpt.data.text import part_text
from fedgpt.evaluate.held_out import HeldOut, as_score
from fedgpt.evaluate.metrics.base import BatchMetric, SampleMetric, make_metrics
from fedgpt.tasks.base import SampleRequest, Task


class CentralEvaluation:
    """Scores, metrics and samples of a version's weights on the held-out text."""

    def __init__(
        self,
        options: RunOptions,
        prepared: Prepared,
        task: Task,
        compute: Compute,
        base: Mapping[str, Tensor] | None = None,
    ):
        """`base` holds the frozen weights, if `model.trainable` leaves some out."""
        self.options, self.task, self.tokenizer = options, task, prepared.tokenizer
        metrics = make_metrics(options.metrics, options.trusted_packages, task.scoring)
        self.scoring = task.scoring.adding(metric.name for metric in metrics)
        self.text = part_text(prepared, HELD_OUT)
        with calling("task", task, "held_out", passes=(ValueError,)):
            examples = task.held_out(self.text, options.model.block_size)
        if not isinstance(examples, Examples):
            what = "it must return fedgpt.data.examples.Examples"
            raise ConfigError(
                f"{typed_class('task', task)}: held_out returned {examples!r:.60}; {what}"
            )
        self.held_out = HeldOut(
            options.model,
            examples.spread(options.evaluate.tokens),
            prepared.tokenizer.token_bytes,
            compute,
            task,
            [metric for metric in metrics if isinstance(metric, BatchMetric)],
            base,
        )
        self._sample_metrics = [metric for metric in metrics if isinstance(metric, SampleMetric)]

    def __call__(self, version: int, params: np.ndarray, sample: bool) -> dict[str, Any]:
        """The scores by name; where asked, `prompt` and `sample`, a text that the model wrote."""
        scores: dict[str, Any] = dict(self.held_out(params))
        if sample:
            with calling("task", self.task, "sample"):
                request = self._request(version)
                written = self.task.sample(self.held_out.model, self.tokenizer, request)
                texts = {"prompt": written.prompt, "sample": written.written}
            for metric in self._sample_metrics:
                with calling("metrics", metric, "value"):
                    value = metric.value(written)
                scores[metric.name] = as_score("metrics", metric, metric.name, value)
            scores |= texts
        return scores

    def _request(self, version: int) -> SampleRequest:
        o = self.options.evaluate
        seed = derive_seed(self.options.seed, "sample", version)
        opening = corpus_prompt(self.options.corpus, self.options.trusted_packages)
        return SampleRequest(self.text, o.prompt, opening, o.sample_tokens, seed)
