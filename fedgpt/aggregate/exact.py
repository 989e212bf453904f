"""A weighted sum of updates in fixed point, which has the same bits for every order of arrival.

Floating-point addition is not associative: (a + b) + c and a + (b + c) round differently. Integer
addition is associative if it does not overflow. So each element of each update is converted to
fixed point, q = rint(delta * weight * 2^k), independently of other updates, and the integers q are
added. They are stored as float64, which adds integers below 2^53 without error.

The scale 2^k is fixed before the first update, from bounds on |delta|, on the weight and on the
number of updates, such that no sum can leave that range. The products are computed in float32, so
half of the work moves half of the bytes. The memory is one accumulator and one update, for any
number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedgpt.aggregate.parallel import map_slices

# elements of a chunk; with shorter ones, threads lose more time waiting for the GIL than the cache
# saves them
CHUNK = 1 << 17
# elements divided at a time, once per version; few, because copying the model waits for the result
PIECE = 1 << 13
SINGLE_BITS, SUM_BITS = 51, 53  # |one contribution| <= 2^51, |sum| <= 2^53
# number of updates added in one pass over the accumulator, whose elements are twice as long as
# theirs
TOGETHER = 2
Part = tuple[np.ndarray, np.float32]  # a delta, and the factor that it is multiplied by


class ExactSum:
    """sum(weight * delta) over float32 vectors, with the same bits in any order.

    Every accepted update has |element| <= bound and 0 < weight <= max_weight, and there are at most
    `count` of them. An update that exceeds a limit is refused with OverflowError and changes
    nothing.

    With u = `resolution`, n updates and s the sum of |weight * delta|, an element of
    `mean(divisor)` is off by at most (0.5 n u + 2^-22.9 s) / divisor (float32's rounding of weights
    and products) + 2^-23.9 of its value (float32's rounding of the result). u is at most bound *
    max_weight * 2^-51 times the count: choose max_weight close to the weights in use, because each
    factor of two costs a bit.

    >>> total = ExactSum(size=2, bound=1.0, count=10, max_weight=4)
    >>> total.add(np.float32([0.5, -0.25]), weight=3)
    >>> total.add(np.float32([0.5, 0.75]), weight=1)
    >>> total.mean(divisor=4).tolist()
    [0.5, 0.0]
    """

    def __init__(self, size: int, bound: float, count: int, max_weight: float = 1.0):
        self.size = size
        self._sum = np.empty(size)  # the integers q, added up
        self.reset(bound, count, max_weight)

    def reset(
        self, bound: float | None = None, count: int | None = None, max_weight: float | None = None
    ) -> None:
        """Start the next version, with new limits if given.

        The accumulator stays allocated, because allocating new pages takes longer than the sums.
        """
        self.bound = self.bound if bound is None else float(bound)
        self.count = self.count if count is None else count
        self.max_weight = self.max_weight if max_weight is None else float(max_weight)
        largest = self.bound * self.max_weight
        if not (
            2.0**-70 < largest < 2.0**100 and 2.0**-70 < self.bound < 2.0**100 and self.count > 0
        ):
            raise ValueError(
                f"no scale for bound={self.bound}, max_weight={self.max_weight}, count={self.count}"
            )
        bits = min(SINGLE_BITS, SUM_BITS - (self.count - 1).bit_length())
        # a power of two: multiplying by it is exact
        self._scale = math.ldexp(1.0, bits - math.frexp(largest)[1])
        self.added = self._folded = 0
        self._waiting: list[Part] = []

    @property
    def resolution(self) -> float:
        """The fixed-point unit: each update adds an error of at most half of it to the sum."""
        return 1.0 / self._scale

    def add(self, delta: np.ndarray, weight: float = 1.0, norm: float = math.inf) -> None:
        """Add weight * delta, where delta is (size,) float32.

        Raises OverflowError, and changes nothing, if a limit is exceeded or an element is NaN.
        `norm` is the L2 norm of delta if the caller knows it: no element exceeds the norm, so the
        elements need not be checked one by one. The delta may be added only together with the next
        one, so it must not change until then.
        """
        if delta.shape != (self.size,) or delta.dtype != np.float32:
            raise ValueError(f"expected {self.size} float32, got {delta.shape} {delta.dtype}")
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0")
        if weight > self.max_weight:
            raise OverflowError(f"weight={weight} is above max_weight={self.max_weight}")
        if self.added == self.count:
            raise OverflowError(f"more than count={self.count} updates")
        # 0.99, because a norm computed in float32 may be slightly too small
        if not norm <= 0.99 * self.bound and not all(
            map_slices(self.size, lambda share: self._fits(delta, share))
        ):
            raise OverflowError(
                f"an element of the update is above bound={self.bound} or not a number"
            )
        self.added += 1
        self._waiting.append((delta, np.float32(weight * self._scale)))
        if len(self._waiting) == TOGETHER:
            self._fold_waiting()

    def mean(self, divisor: float, out: np.ndarray | None = None) -> np.ndarray:
        """(size,) float32: the sum divided by `divisor`, or zeros if nothing was added."""
        out = np.empty(self.size, np.float32) if out is None else out
        if self.added == 0:
            out.fill(0)
            return out
        if not 0 < divisor < math.inf:
            raise ValueError(f"divisor={divisor} must be a number above 0")
        self._fold_waiting()
        quotient = np.empty(PIECE)
        for piece in _chunks(range(self.size), PIECE):
            total = self._sum[piece]
            out[piece] = np.divide(total, divisor * self._scale, out=quotient[: total.size])
        return out

    def _fits(self, delta: np.ndarray, share: range) -> bool:
        """Whether every element of a share of delta is within the bound; False if one is NaN."""
        pieces = (delta[chunk] for chunk in _chunks(share, CHUNK))
        return all(piece.max() <= self.bound and piece.min() >= -self.bound for piece in pieces)

    def _fold_waiting(self) -> None:
        parts, self._waiting = self._waiting, []
        if parts:
            map_slices(self.size, lambda share: self._fold(parts, share))
            self._folded += len(parts)

    def _fold(self, parts: Sequence[Part], share: range) -> None:
        """Add the parts, in fixed point, to a share of the accumulator, one chunk at a time."""
        buffer = np.empty(min(CHUNK, len(share)), np.float32)
        for chunk in _chunks(share, CHUNK):
            total = self._sum[chunk]
            fixed = buffer[: total.size]
            for number, (delta, factor) in enumerate(parts):
                np.multiply(delta[chunk], factor, out=fixed)
                np.rint(fixed, out=fixed)
                if self._folded + number == 0:
                    total[...] = fixed  # the first update of a version: no need to fill with zeros
                else:
                    np.add(total, fixed, out=total)


def _chunks(share: range, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, share.stop)) for start in share[::length])
