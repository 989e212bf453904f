"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133): a step's gradient from a Poisson sample, clipped,
noised.

g = (sum_{i in S} c_i g_i + N(0, (z C)^2)) / (q n), c_i = min(1, C / ||g_i||); every block is in S
with probability q, by itself. The divisor is the constant q n, never |S|: who is in S must not
show. An empty S still gives a noisy step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedgpt.core.flat import FlatParams
from fedgpt.data.batches import Blocks
from fedgpt.local.bookkeeping import BookKeeping
from fedgpt.local.opacus_hooks import OpacusHooks
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream

MOST_BYTES = 1 << 29  # of per-example gradients held at a time


class Engine(Protocol):
    """Whatever makes clipped sums of per-example gradients."""

    def add_clipped(
        self, losses: Callable[[], Tensor], clip: float, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See BookKeeping.add_clipped."""
        ...


@dataclass(frozen=True)
class PrivateSteps:
    """What makes one job's steps private."""

    blocks: Blocks
    stream: SecureStream  # of this job alone
    probability: float  # q
    noise_multiplier: float  # z
    clip: float  # C


class PrivateGradient:
    """The private counterpart of a step's gradient, for one model's buffers."""

    def __init__(self, model: GPT, layout: FlatParams, engine: str, batch_size: int):
        self.model = model
        self.engine: Engine = {"bookkeeping": BookKeeping, "opacus": OpacusHooks}[engine](
            model, layout
        )
        self.examples = max(1, min(batch_size, MOST_BYTES // (4 * layout.size)))  # at a time

    def fill(self, grad: Tensor, steps: PrivateSteps) -> None:
        """Write one step's noisy gradient into the flat vector `grad`."""
        blocks = steps.blocks
        chosen = np.flatnonzero(steps.stream.uniform(len(blocks)) < steps.probability)
        grad.zero_()
        for part in np.array_split(chosen, -(-len(chosen) // self.examples)) if len(chosen) else ():
            inputs, targets = blocks.take(part)
            self.engine.add_clipped(
                self._losses(inputs.to(grad.device), targets.to(grad.device)), steps.clip, grad
            )
        steps.stream.add_normal(grad, steps.noise_multiplier * steps.clip)
        grad.div_(steps.probability * len(blocks))

    def _losses(self, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
        return lambda: example_losses(self.model, inputs, targets)


def example_losses(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """(batch,) mean cross-entropy of each example's own tokens."""
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(len(inputs), -1).mean(1)
