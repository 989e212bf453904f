"""Held-out loss, perplexity and bits per byte of a flat parameter vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fedgpt.core.device import Compute
from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions
from fedgpt.data.batches import windows
from fedgpt.model.build import build_model
from fedgpt.model.generate import generate

MOST_LOGITS = 1 << 26  # at a time on a GPU: 256 MB in float32


@dataclass(frozen=True)
class Evaluation:
    """Scores of one model on the held-out text.

    Bits per byte divide by the bytes of the text instead of by tokens, so models with different
    tokenizers compare.
    """

    loss: float  # nats per token
    perplexity: float  # exp(loss)
    bits_per_byte: float

    def as_dict(self) -> dict[str, float]:
        """As metrics.jsonl has it."""
        return asdict(self)


class HeldOut:
    """The central evaluation stage: its own model, held-out tokens cut into windows of block_size.

    Every token is predicted once, from at most block_size - 1 earlier ones of its window: a lower
    bound of what the model can do. `tokens` > 0 takes that many, spread evenly over the held-out
    text.
    """

    def __init__(
        self,
        model: ModelOptions,
        tokens: np.ndarray,
        token_bytes: np.ndarray,
        compute: Compute,
        limit: int = 0,
        base: Mapping[str, torch.Tensor] | None = None,
    ):
        """`base` holds the frozen weights, if `model.trainable` leaves some out."""
        self.model = build_model(model, len(token_bytes), base).eval()
        self.model.to(compute.device, compute.torch_dtype)
        self.layout, self._working = flatten(self.model)
        inputs, targets = windows(tokens, model.block_size)
        if limit and limit < tokens.size:
            rows = (
                np.linspace(0, len(inputs) - 1, max(1, limit // model.block_size))
                .round()
                .astype(np.int64)
            )
            rows = torch.from_numpy(np.unique(rows))
            inputs, targets = inputs[rows], targets[rows]
        self._inputs, self._targets = inputs, targets
        scored = targets[targets >= 0].numpy()
        self.tokens, self.bytes = int(scored.size), int(token_bytes[scored].sum())
        # tokens at a time: a CPU's cache shall keep their logits, and a GPU has room for clients,
        # too
        together = 512 if compute.device == "cpu" else min(8192, MOST_LOGITS // len(token_bytes))
        self._batch = max(1, together // model.block_size)

    def load(self, params: np.ndarray) -> None:
        """Put a flat vector into the evaluation's model."""
        host = torch.empty(params.size)
        np.copyto(host.numpy(), params)
        self._working.copy_(host)

    @torch.inference_mode()
    def __call__(self, params: np.ndarray) -> Evaluation:
        """Score `params`, (parameters,) float32."""
        self.load(params)
        device = self._working.device
        # read at the end: a GPU need not be waited for
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, len(self._inputs), self._batch):
            targets = self._targets[start : start + self._batch].to(device)
            mean = self.model.loss(self._inputs[start : start + self._batch].to(device), targets)
            total += mean.double() * (targets >= 0).sum()
        nats = float(total)
        loss = nats / self.tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation(loss, perplexity, nats / math.log(2) / max(self.bytes, 1))

    def sample(self, prompt: list[int], length: int, seed: int, end: int) -> list[int]:
        """Tokens that the model last loaded or evaluated writes after `prompt`."""
        return generate(self.model, prompt, length, temperature=0.8, top_k=50, stop=end, seed=seed)[
            0
        ]
