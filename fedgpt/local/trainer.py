"""Local training: H optimiser steps on a client's text, on buffers that the process reuses.

Master weights, gradients and moments are flat float32 vectors. In bf16 the model's parameters are
views of a second, bf16 vector that is rewritten after each step; in fp32 they are views of the
master itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedgpt.core.device import Compute, repeat_exactly
from fedgpt.core.flat import base_digest, flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.examples import BatchSource
from fedgpt.local.gradient import BatchGradient, RecordedGradient
from fedgpt.local.optimizer import FlatAdamW, Moments
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.local.schedule import learning_rate
from fedgpt.model.build import build_model
from fedgpt.tasks.base import Task
from fedgpt.tasks.lm import LanguageModel

# names of `Strategy.client_numbers` that local training supports
CLIENT_NUMBERS = frozenset({"proximal_mu"})


@dataclass(frozen=True)
class Trained:
    """The outcome of one job."""

    delta: np.ndarray  # (parameters,) float32, start - end; a buffer that the next job overwrites
    tokens: int  # input positions trained on
    moments: Moments
    metrics: dict[str, float]


class Trainer:
    """One model's buffers and the training loop; reused for every client of this process.

    In a step, `gradient` or `private` fills the gradient vector and `optimizer` changes the
    parameter vector. `micro_batch`, which may be lowered before the first job, is the number of
    sequences whose gradients are computed at the same time. Within rounding, the update does not
    depend on it. Dropout does: each micro-batch draws its own.
    """

    def __init__(  # noqa: PLR0913  # one buffer for each of its parts
        self,
        model: ModelOptions,
        vocab_size: int,
        local: LocalOptions,
        compute: Compute,
        engine: str = "bookkeeping",
        task: Task | None = None,
        base: Mapping[str, torch.Tensor] | None = None,
    ):
        """`engine` makes the per-example gradients of private jobs: bookkeeping or opacus.

        The default of `task` is task=lm. `base` contains the frozen weights, if there are any.
        """
        self.options = local
        self.micro_batch = local.batch_size
        self.compute = compute
        self.engine = engine
        self.task = task or LanguageModel()
        device = torch.device(compute.device)
        repeat_exactly(device.type)
        self.base_digest = base_digest(base or {})
        self.model = build_model(model, vocab_size, base).to(device, compute.torch_dtype)
        self.model.train()
        self.layout, self.working = flatten(self.model)
        self.params = (
            self.working
            if compute.dtype == "fp32"
            else torch.zeros_like(self.working, dtype=torch.float32)
        )
        self.grad = torch.zeros_like(self.params)
        self.optimizer = FlatAdamW(self.params, self.grad, self.layout.decayed, local)
        self._start = torch.zeros_like(self.params)
        self._delta = torch.zeros(self.layout.size, pin_memory=device.type == "cuda")

    @cached_property
    def gradient(self) -> BatchGradient:
        """The gradients of jobs that are not private; on a GPU a CUDA graph."""
        # a graph takes batches of one shape
        equal = self.options.batch_size % self.micro_batch == 0
        recorded = equal and self.params.device.type == "cuda"
        kind = RecordedGradient if recorded else BatchGradient
        return kind(self.model, self.task, self.layout, self.grad, self.micro_batch)

    @cached_property
    def private(self) -> PrivateGradient:
        """The gradients of private jobs."""
        return PrivateGradient(self.model, self.layout, self.task, self.engine, self.micro_batch)

    def train(
        self,
        start: np.ndarray,
        source: BatchSource | PrivateSteps,
        plan: Plan,
        moments: Moments | None,
        dropout_seed: int = 0,
    ) -> Trained:
        """Train `plan.local_steps` steps from `start` and return `start - end`.

        The metrics of private steps have no loss, because it depends on the text without noise.
        Raises ValueError for a strategy number this client does not know.
        """
        if unknown := set(plan.numbers) - CLIENT_NUMBERS:
            raise ValueError(
                f"the strategy asks for {sorted(unknown)}; this client knows"
                f" {sorted(CLIENT_NUMBERS)}"
            )
        o = self.options
        torch.manual_seed(dropout_seed)
        self._receive(start)
        self.optimizer.load(moments)
        mu = plan.numbers.get("proximal_mu", 0.0)
        losses, norm = torch.zeros((), device=self.params.device), torch.zeros(())
        lr = 0.0
        for step in range(plan.local_steps):
            if isinstance(source, PrivateSteps):
                self.private.fill(self.grad, source)
            else:
                losses += self.gradient.fill(source, o.accumulate)
            if mu:
                # mu (w - start), FedProx
                self.grad.add_(self.params, alpha=mu).sub_(self._start, alpha=mu)
            norm = self._clip()
            tokens_done = plan.tokens_done + (step + 1) * plan.tokens_per_step
            lr = learning_rate(
                tokens_done, plan.tokens_total, lr=o.lr, min_lr=o.last_lr, warmup=o.warmup
            )
            self.optimizer.step(lr)
            if self.working is not self.params:
                self.working.copy_(self.params)
        window = self.model.options.block_size
        tokens = plan.local_steps * o.accumulate * o.batch_size * window
        metrics = {"lr": lr, "grad_norm": float(norm)}
        if not isinstance(source, PrivateSteps):
            metrics["train_loss"] = float(losses) / max(plan.local_steps, 1)
            if self.micro_batch < o.batch_size:
                metrics["micro_batch"] = float(self.micro_batch)
        return Trained(self._send(), tokens, self.optimizer.moments(), metrics)

    def _clip(self) -> torch.Tensor:
        """Scale the gradient to norm `grad_clip` at most, as torch's clip_grad_norm_ does."""
        norm = torch.linalg.vector_norm(self.grad)
        limit = self.options.grad_clip
        if limit and not math.isinf(limit):
            self.grad.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _receive(self, start: np.ndarray) -> None:
        if start.shape != (self.layout.size,) or start.dtype != np.float32:
            raise ValueError(
                f"received {start.dtype}{start.shape}, this model has float32({self.layout.size},)"
            )
        # not torch.from_numpy(start): received vectors are read-only
        np.copyto(self._delta.numpy(), start)
        self._start.copy_(self._delta)
        self.params.copy_(self._start)
        if self.working is not self.params:
            self.working.copy_(self.params)

    def _send(self) -> np.ndarray:
        if self.params.device.type == "cpu":
            torch.sub(self._start, self.params, out=self._delta)
        else:
            self._delta.copy_(self._start - self.params)
        return self._delta.numpy()
