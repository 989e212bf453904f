"""The learning rate, a function of the tokens that all clients together have trained on."""

from __future__ import annotations

import math

from fedgpt.core.options import RunOptions


def learning_rate(
    tokens_done: int, tokens_total: int, *, lr: float, min_lr: float, warmup: float
) -> float:
    """Linear warm-up over the share `warmup` of all tokens, then a cosine from `lr` to `min_lr`.

    >>> rate = lambda tokens: learning_rate(tokens, 100, lr=1.0, min_lr=0.1, warmup=0.1)
    >>> [round(rate(tokens), 3) for tokens in (0, 5, 10, 55, 100, 200)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    warm = warmup * tokens_total
    if tokens_done < warm:
        return lr * tokens_done / warm
    if tokens_done >= tokens_total:
        return min_lr
    progress = (tokens_done - warm) / (tokens_total - warm)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def tokens_per_step(options: RunOptions) -> int:
    """Tokens of one local optimiser step."""
    local = options.local
    return local.accumulate * local.batch_size * options.model.block_size
