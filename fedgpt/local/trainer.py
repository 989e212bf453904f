"""Local training: H optimiser steps on a client's shard, on buffers that live as long as the
process.

Master weights, gradients and moments are flat float32 vectors. In bf16 the model's parameters are
views of a second, bf16 vector that is rewritten after each step; in fp32 they are views of the
master itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from fedgpt.core.device import Compute, repeat_exactly
from fedgpt.core.flat import base_digest, flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.local.gradient import BatchGradient, RecordedGradient
from fedgpt.local.optimizer import FlatAdamW, Moments
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.local.schedule import learning_rate
from fedgpt.model.build import build_model

CLIENT_NUMBERS = frozenset({"proximal_mu"})  # what a strategy may ask of a client, by name


class BatchSource(Protocol):
    """Anything that yields (inputs, targets), each (batch, time) int64."""

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next batch."""
        ...


@dataclass(frozen=True)
class Trained:
    """The outcome of one job; `delta` is a kept buffer that the next job overwrites."""

    delta: np.ndarray  # (parameters,) float32, start - end
    tokens: int
    moments: Moments
    metrics: dict[str, float]


class Trainer:
    """One model's buffers and the loop over them; reused for every client that this process
    trains.
    """

    def __init__(
        self,
        model: ModelOptions,
        vocab_size: int,
        local: LocalOptions,
        compute: Compute,
        engine: str = "bookkeeping",
        base: Mapping[str, torch.Tensor] | None = None,
    ):
        """`engine` makes the per-example gradients of private jobs: bookkeeping or opacus.

        `base` holds the frozen weights, if `model.trainable` leaves some out.
        """
        self.options = local
        self.compute = compute
        self.block_size = model.block_size
        self.engine = engine
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
        views = self.layout.views(self.grad)
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self._grad_views = [views[name] for name in names]
        self._start = torch.zeros_like(self.params)
        self._delta = torch.zeros(self.layout.size, pin_memory=device.type == "cuda")

    @cached_property
    def gradient(self) -> BatchGradient:
        """The gradients of jobs that are not private; on a GPU a recording, made when first asked
        for.
        """
        if self.params.device.type == "cuda":
            return RecordedGradient(self.model, self.options.batch_size)
        return BatchGradient(self.model)

    @cached_property
    def private(self) -> PrivateGradient:
        """The gradients of private jobs."""
        return PrivateGradient(self.model, self.layout, self.engine, self.options.batch_size)

    def train(
        self,
        start: np.ndarray,
        batches: BatchSource | PrivateSteps,
        plan: Plan,
        moments: Moments | None,
        dropout_seed: int = 0,
    ) -> Trained:
        """Train `plan.local_steps` steps from `start` and return `start - end`; private ones tell
        nothing of their loss.

        Raises ValueError for a strategy number this client does not know.
        """
        if unknown := set(plan.numbers) - CLIENT_NUMBERS:
            raise ValueError(
                f"the strategy asks for {sorted(unknown)}; this client knows"
                f" {sorted(CLIENT_NUMBERS)}"
            )
        torch.manual_seed(dropout_seed)
        self._receive(start)
        self.optimizer.load(moments)
        mu = plan.numbers.get("proximal_mu", 0.0)
        losses, norm = torch.zeros((), device=self.params.device), torch.zeros(())
        lr = 0.0
        for step in range(plan.local_steps):
            if isinstance(batches, PrivateSteps):
                self.private.fill(self.grad, batches)
            else:
                losses += self._gradient(batches)
            if mu:
                # mu (w - start), FedProx
                self.grad.add_(self.params, alpha=mu).sub_(self._start, alpha=mu)
            norm = self._clip()
            tokens_done = plan.tokens_done + (step + 1) * plan.tokens_per_step
            o = self.options
            lr = learning_rate(
                tokens_done, plan.tokens_total, lr=o.lr, min_lr=o.last_lr, warmup=o.warmup
            )
            self.optimizer.step(lr)
            if self.working is not self.params:
                self.working.copy_(self.params)
        tokens = (
            plan.local_steps * self.options.accumulate * self.options.batch_size * self.block_size
        )
        metrics = {"lr": lr, "grad_norm": float(norm)}
        if not isinstance(batches, PrivateSteps):
            metrics["train_loss"] = float(losses) / max(plan.local_steps, 1)
        return Trained(self._send(), tokens, self.optimizer.moments(), metrics)

    def _gradient(self, batches: BatchSource) -> torch.Tensor:
        """Fill the gradient vector from the step's micro-batches; returns their mean loss."""
        total = torch.zeros((), device=self.params.device)
        count = self.options.accumulate
        for micro in range(count):
            loss, grads = self.gradient(*batches.next())
            if micro == 0:
                torch._foreach_copy_(self._grad_views, grads)  # pyright: ignore[reportPrivateImportUsage]  # no public form
            else:
                for view, grad in zip(self._grad_views, grads, strict=True):
                    view.add_(grad)
            total += loss
        if count > 1:
            self.grad.div_(count)
        return total / count

    def _clip(self) -> torch.Tensor:
        """Scale the gradient to norm `grad_clip` at most, as torch.nn.utils.clip_grad_norm_
        does.
        """
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
