"""Helpers of the rules that need all updates of a cohort at once (median, Krum, ...).

The updates are rows of a matrix (updates, parameters), too large for a float64 copy, so the rules
work on one block of parameters at a time: beside the updates and the result they allocate a block.
The rows are in the order of stable client ids, so the order of arrival does not change any bit of
the result, which is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.core.errors import StoppedEarly
from fedgpt.core.messages import Pacing, Update

# elements of a block: 1 MiB of float64, so that several passes over it stay in a second-level cache
BLOCK = 1 << 17


def shortage(
    rule: Strategy, needed: int, pacing: Pacing, option: str = "", change: str = ""
) -> Iterator[str]:
    """For `problems`: that the cohort is too small for `option`, or for the rule itself."""
    if pacing.goal < needed:
        yield (
            f"{option or f'strategy={rule.name}'} needs at least {needed} updates a server step and"
            f" pace={pacing.name} waits for {pacing.goal}: raise"
            f" {' and '.join(pacing.limits)}{change}"
        )


def in_order(rule: Strategy, updates: Sequence[Update]) -> list[Update]:
    """The updates by stable client id.

    Raises StoppedEarly if there are some updates, but fewer than the rule needs.
    """
    if 0 < len(updates) < rule.needed:
        raise StoppedEarly(
            f"strategy={rule.name} needs at least {rule.needed} updates a server step,"
            f" {len(updates)} arrived and the other clients failed or were rejected: the result of"
            " so few would not be robust; raise pace.clients, or pace.rate if it is set"
        )
    return sorted(updates, key=lambda update: (update.client, update.number))


def parts(size: int, rows: int = 1) -> Iterator[slice]:
    """Slices that cover `size` parameters; `rows` rows of a slice are at most one block."""
    step = max(1, BLOCK // rows)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def blocks(updates: Sequence[Update]) -> Iterator[tuple[slice, np.ndarray]]:
    """For each block: its slice of the parameters, and the updates there as float64 rows."""
    if updates:
        for part in parts(updates[0].delta.size, len(updates)):
            yield part, np.stack([update.delta[part] for update in updates], dtype=np.float64)


def reduced(
    updates: Sequence[Update], params: np.ndarray, rule: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """D, with shape and dtype of params, from a rule (updates, parameters) -> (parameters,).

    The rule is applied to each block; D is zero if there are no updates.
    """
    out = np.zeros_like(params)
    for part, block in blocks(updates):
        out[part] = rule(block)
    return out


def weighted(updates: Sequence[Update], weights: np.ndarray, params: np.ndarray) -> np.ndarray:
    """sum_i weights_i D_i, with shape and dtype of params."""
    return reduced(updates, params, lambda block: (weights[:, None] * block).sum(axis=0))


def distances(updates: Sequence[Update], centre: np.ndarray | None = None) -> np.ndarray:
    """(updates,) float64: ||D_i - centre||, or ||D_i||; the difference is taken first."""
    squares = np.zeros(len(updates))
    for part, block in blocks(updates):
        apart = block if centre is None else block - centre[part]
        squares += np.einsum("ij,ij->i", apart, apart)
    return np.sqrt(squares)


def ratio(numerator: np.ndarray | float, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, and 0 where that is 0, because a zero update has no direction."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, np.divide(numerator, denominator), 0.0)


def middle(updates: Sequence[Update], cut: int, params: np.ndarray) -> np.ndarray:
    """D: the mean of every coordinate without its `cut` lowest and `cut` highest values.

    A sorting network over the updates sorts every coordinate, taking the minimum and the maximum of
    two rows at a time: the rows of a block stay in the second-level cache, and no element moves
    within its row. The mean is computed in float64.
    """
    if not updates:
        return np.zeros_like(params)
    count = len(updates)
    if count == 1:
        return updates[0].delta.copy()
    steps = comparators(count, range(cut, count - cut)) if cut else ()
    out = np.empty_like(params)
    buffer = np.empty((count + 1, max(1, min(params.size, BLOCK // count))), updates[0].delta.dtype)
    for part in parts(params.size, count):
        *rows, spare = (row[: part.stop - part.start] for row in buffer)
        for row, update in zip(rows, updates, strict=True):
            np.copyto(row, update.delta[part])
        for low, high in steps:
            np.minimum(rows[low], rows[high], out=spare)
            np.maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = spare, rows[low]
        if count - 2 * cut == 1:
            out[part] = rows[cut]
            continue
        total = rows[cut].astype(np.float64)
        for row in rows[cut + 1 : count - cut]:
            total += row
        out[part] = total / (count - 2 * cut)
    return out


@lru_cache
def comparators(count: int, wanted: range) -> tuple[tuple[int, int], ...]:
    """Pairs (low, high) that, applied in order, sort the `wanted` ranks of `count` values.

    This is Batcher's odd-even merge network (1968) for any count, without the comparisons that
    cannot affect a wanted rank.

    >>> comparators(3, range(3))
    ((0, 1), (0, 2), (1, 2))
    """
    pairs = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(min(k, count - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    needed, kept = set(wanted), []
    for low, high in reversed(pairs):
        if low in needed or high in needed:
            kept.append((low, high))
            needed |= {low, high}
    return tuple(reversed(kept))
