"""The central evaluation of a run: what the server adds to the line of an evaluated version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fedgpt.core.device import Compute
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.corpus import corpus_prompt
from fedgpt.data.prepare import HELD_OUT, Prepared
from fedgpt.data.text import part_text
from fedgpt.evaluate.held_out import HeldOut
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
        examples = task.held_out(self.text, options.model.block_size)
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
            written = self.task.sample(self.held_out.model, self.tokenizer, self._request(version))
            scores |= {metric.name: metric.value(written) for metric in self._sample_metrics}
            scores |= {"prompt": written.prompt, "sample": written.written}
        return scores

    def _request(self, version: int) -> SampleRequest:
        o = self.options.evaluate
        seed = derive_seed(self.options.seed, "sample", version)
        opening = corpus_prompt(self.options.corpus, self.options.trusted_packages)
        return SampleRequest(self.text, o.prompt, opening, o.sample_tokens, seed)
