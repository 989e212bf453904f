"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): a step's gradient is a clipped sum with noise.

g = (sum_{i in S} c_i g_i + N(0, (z C)^2)) / (q n), c_i = min(1, C / ||g_i||). Each of the n units
is in the sample S with probability q, independently of the others (Poisson sampling). The divisor
is the constant q n and not |S|, because the size of S must stay secret. If S is empty, the step
consists of noise only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from fedgpt.core.flat import FlatParams
from fedgpt.data.examples import Batch, ExampleSet, on_device
from fedgpt.local.bookkeeping import BookKeeping
from fedgpt.local.opacus_hooks import OpacusHooks
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.tasks.base import Task

MOST_BYTES = 1 << 29  # largest memory for per-example gradients, in bytes


class Engine(Protocol):
    """An implementation of clipped sums of per-example gradients."""

    def add_clipped(
        self, losses: Callable[[], Tensor], clip: float, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See BookKeeping.add_clipped."""
        ...


@dataclass(frozen=True)
class PrivateSteps:
    """The settings of one job's private steps."""

    units: ExampleSet  # units of privacy of the client's text
    stream: SecureStream  # random values for sampling and noise of this job only
    probability: float  # q
    noise_multiplier: float  # z
    clip: float  # C


class PrivateGradient:
    """The gradient of a private step; its buffers are reused from step to step."""

    def __init__(self, model: GPT, layout: FlatParams, task: Task, engine: str, at_once: int):
        """`at_once`: largest number of examples whose gradients are computed at the same time."""
        self.model, self.task = model, task
        self.engine: Engine = {"bookkeeping": BookKeeping, "opacus": OpacusHooks}[engine](
            model, layout
        )
        # number of examples whose gradients are in memory at the same time
        self.examples = max(1, min(at_once, MOST_BYTES // (4 * layout.size)))
        self._rehearsed = False

    def rehearse(self, grad: Tensor, units: ExampleSet) -> None:
        """Compute one micro-batch of the full size into `grad`, once, for the memory that it takes.

        So a job that does not fit fails before its noise is paid for.
        """
        if self._rehearsed:
            return
        batch = on_device(units.take(np.arange(self.examples) % len(units)), grad.device)
        self.engine.add_clipped(self.losses_of(batch), 1.0, grad)
        self._rehearsed = True

    def fill(self, grad: Tensor, steps: PrivateSteps) -> None:
        """Write one step's noisy gradient into the flat vector `grad`."""
        units = steps.units
        chosen = np.flatnonzero(steps.stream.uniform(len(units)) < steps.probability)
        grad.zero_()
        for part in np.array_split(chosen, -(-len(chosen) // self.examples)) if len(chosen) else ():
            batch = on_device(units.take(part), grad.device)
            self.engine.add_clipped(self.losses_of(batch), steps.clip, grad)
        steps.stream.add_normal(grad, steps.noise_multiplier * steps.clip)
        grad.div_(steps.probability * len(units))

    def losses_of(self, batch: Batch) -> Callable[[], Tensor]:
        """A function that runs the model and returns each example's own loss, (batch,)."""
        return lambda: self.task.example_losses(self.task.forward(self.model, batch), batch)
