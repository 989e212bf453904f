"""Two hand-written computations, because torch's own are slow in bf16 on a CPU.

Both give the results of the plain functions in gpt.py, which decides when to call them. Shapes are
named as in gpt.py: batch, heads, time, width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100  # a target without a loss
# rows of logits that RowwiseCrossEntropy takes at once: one megabyte in fp32 at 4,097 tokens
ROWS = 64


def attend_explicitly(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention like `attend` of gpt.py, as two batched matrix products.

    Twice as fast as torch's bf16 kernel on a CPU with AMX, but it stores every score: (batch *
    heads, new, seen).
    """
    batch, heads, new, width = q.shape
    seen = k.size(2)
    if k.size(1) != heads:  # copies of the keys and values for the heads that share them
        k, v = (part.repeat_interleave(heads // part.size(1), 1) for part in (k, v))
    q, k, v = (part.reshape(batch * heads, -1, width) for part in (q, k, v))
    # -inf for every key that lies in the future of a query, 0 for the others
    mask = torch.full((new, seen), -math.inf, dtype=q.dtype, device=q.device).triu_(1 + seen - new)
    # (batch * heads, new, seen)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    shares = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(shares, v).view(batch, heads, new, width)


class RowwiseCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of bf16 logits on a CPU, computed in fp32 for a few rows at a time.

    Logits are the largest tensor of a small model, and casting all of them to fp32 passes over
    memory about ten times. Here a group of rows stays in the processor's cache for loss and
    gradient, which is 2.7 times as fast. For fp32 logits there is no speedup. It works neither
    under vmap nor for second derivatives: torch raises an error if asked for them.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (rows, vocab), targets (rows) -> scalar; also computes and saves the gradient."""
        counts = (targets != IGNORE).float()[:, None]  # (rows, 1)
        weights = counts / counts.sum()
        targets = targets.clamp(min=0)[:, None]
        grad = torch.empty_like(logits)
        losses = torch.empty_like(weights)
        for start in range(0, len(logits), ROWS):
            rows = slice(start, start + ROWS)
            x, target = logits[rows].float(), targets[rows]
            p = x.softmax(-1)
            # log(sum(exp(x))) from the largest entry, whose share never underflows; log_softmax is
            # four times slower
            losses[rows] = x.amax(-1, True) - p.amax(-1, True).log() - x.gather(1, target)
            # the gradient with respect to logits is softmax - one-hot target
            p.scatter_add_(1, target, p.new_full((), -1.0).expand(target.shape))
            grad[rows] = p.mul_(weights[rows])
        ctx.save_for_backward(grad)
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides ctx
        ctx, *upstream: Tensor
    ) -> tuple[Tensor, None]:
        """The saved gradient times the upstream one, which is 1 unless the loss was scaled."""
        (grad,) = ctx.saved_tensors
        # a multiplication by 1 would be one more pass over memory, a tenth of a training step
        return grad if upstream[0] == 1 else grad * upstream[0], None
