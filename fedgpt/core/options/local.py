"""Options of the group `local`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, above, at_least, between, one_of, option, share


@dataclass
class LocalOptions(Group):
    """Training of one job at a client."""

    group = "local"

    steps: int = option(
        40, "Number of optimiser steps in one job.", unit="steps", allowed=at_least(1, end=10**7)
    )
    batch_size: int = option(
        8,
        "Number of sequences in a micro-batch. A sequence has model.block_size tokens.",
        unit="sequences",
        allowed=at_least(1, end=10**6),
    )
    accumulate: int = option(
        1,
        "Number of micro-batches whose gradients are averaged for one optimiser step.",
        unit="micro-batches",
        allowed=at_least(1, end=10**6),
    )
    lr: float = option(
        3e-3,
        "Highest learning rate, reached after the warm-up. It then falls along a cosine until the"
        " end of the run.",
        allowed=above(0, most=1),
    )
    min_lr: float | None = option(
        None,
        "Learning rate at the end of the run. null means a tenth of local.lr.",
        allowed=between(0, 1),
    )
    warmup: float = option(
        0.05,
        "Share of the run's tokens during which the learning rate rises from 0 to local.lr.",
        allowed=share("a share of the run's tokens"),
    )
    beta1: float = option(
        0.9, "AdamW: decay of the running mean of the gradients.", allowed=share()
    )
    # batches are small: 0.99 beat 0.95 by 2.5 % in bits per byte at the demo's size
    beta2: float = option(
        0.99, "AdamW: decay of the running mean of the squared gradients.", allowed=share()
    )
    weight_decay: float = option(
        0.1, "AdamW: weight decay of matrices and embeddings.", allowed=at_least(0, end=10**6)
    )
    grad_clip: float = option(
        1.0,
        "Largest gradient norm over all parameters. A longer gradient is scaled down to this norm.",
        allowed=at_least(0, zero="off"),
    )
    moments: str = option(
        "keep",
        "AdamW's running means (moments) after a job. keep: the client stores them for its next"
        " job. reset: every job starts with zeros.",
        allowed=one_of("keep", "reset"),
    )
    precision: str = option(
        "auto",
        "Number format of matrix products. auto: bf16 on hardware with bf16 units, otherwise fp32.",
        allowed=one_of("auto", "fp32", "bf16"),
    )

    @property
    def last_lr(self) -> float:
        """The learning rate at which the cosine ends."""
        return float(f"{self.lr / 10:g}") if self.min_lr is None else self.min_lr

    def rules(self) -> Iterator[str]:
        """The learning rate must not rise towards the end."""
        if self.min_lr is not None and self.min_lr > self.lr > 0:
            yield (
                f"local.min_lr={self.min_lr}: must not be above local.lr={self.lr}; lower it, or"
                " leave it out"
            )
