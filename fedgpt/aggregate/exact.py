"""The weighted sum of updates whose bits do not depend on the order in which they arrive.

Floating-point addition is not associative, integer addition is. Each element of each update becomes an integer by
a rule that looks at that update alone, q = round(delta * weight * 2^k), and integers are added in one int64
accumulator. The scale 2^k is fixed before the first update from a bound on |delta|, on the weight and on the number
of updates, so that nothing can overflow. Memory is one accumulator, whatever the number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fedgpt.aggregate.team import shared

CHUNK = 1 << 17  # elements; with shorter chunks threads wait for the interpreter more than they gain from the cache
PIECE = 1 << 13  # elements divided at a time, once a version: small, as a copy of the model waits for the result
SINGLE_BITS, SUM_BITS = 51, 62  # |one contribution| < 2^51, |sum| < 2^62

# Adding 1.5 * 2^52 to a float64 x with |x| <= 2^51 rounds x to an integer (ties to even, as np.rint) and leaves that
# integer in the low bits: read as int64, the result is MAGIC_BITS + round(x). One addition instead of np.rint and a
# conversion: 15 to 30 % less time for an update. The constants add up modulo 2^64 and come off at the end.
MAGIC = 1.5 * 2.0**52
MAGIC_BITS = int(np.float64(MAGIC).view(np.int64))


class ExactSum:
    """sum(weight * delta) over float32 vectors, to the same bits in any order.

    Every accepted update has |element| <= bound and 0 < weight <= max_weight, and there are at most `count` of
    them; what exceeds that is refused with OverflowError and changes nothing. With u = `resolution` and n updates
    an element of `mean(divisor)` is off by at most (0.625 n u / divisor) + 2^-23.9 of its value (the latter is
    float32's own rounding). u is bound * max_weight * 2^-50 or finer for up to 2,048 updates and grows in
    proportion to the count above that: choose max_weight near the weights in use, each factor of two costs a bit.

    >>> total = ExactSum(size=2, bound=1.0, count=10, max_weight=4)
    >>> total.add(np.float32([0.5, -0.25]), weight=3)
    >>> total.add(np.float32([0.5, 0.75]), weight=1)
    >>> total.mean(divisor=4).tolist()
    [0.5, 0.0]
    """

    def __init__(self, size: int, bound: float, count: int, max_weight: float = 1.0):
        self.size = size
        self._sum = np.empty(size, np.int64)  # modulo 2^64, with `added` times MAGIC_BITS in it
        self.reset(bound, count, max_weight)

    def reset(self, bound: float | None = None, count: int | None = None, max_weight: float | None = None) -> None:
        """Start the next version, with new limits where given; keeps the memory (fresh pages cost more than adding)."""
        self.bound = self.bound if bound is None else float(bound)
        self.count = self.count if count is None else count
        self.max_weight = self.max_weight if max_weight is None else float(max_weight)
        largest = self.bound * self.max_weight
        if not (2.0**-300 < largest < 2.0**300 and self.bound > 0 and self.count > 0):
            raise ValueError(f"no scale for bound={self.bound}, max_weight={self.max_weight}, count={self.count}")
        bits = min(SINGLE_BITS, SUM_BITS - (self.count - 1).bit_length())
        self._scale = math.ldexp(1.0, bits - math.frexp(largest)[1])  # a power of two: multiplying by it is exact
        self.added = 0

    @property
    def resolution(self) -> float:
        """The unit of the integers: an error of at most 0.625 of it in the sum for each update."""
        return 1.0 / self._scale

    def add(self, delta: np.ndarray, weight: float = 1.0, norm: float = math.inf) -> None:
        """Add weight * delta; raises OverflowError, and changes nothing, where a limit is exceeded or delta is NaN.

        `norm` is the delta's length, where it is known: no element exceeds it, and the look at all of them is spared.
        """
        if delta.shape != (self.size,) or delta.dtype != np.float32:
            raise ValueError(f"expected {self.size} float32, got {delta.shape} {delta.dtype}")
        if not weight > 0:
            raise ValueError(f"weight={weight} must be above 0")
        if weight > self.max_weight:
            raise OverflowError(f"weight={weight} is above max_weight={self.max_weight}")
        if self.added == self.count:
            raise OverflowError(f"more than count={self.count} updates")
        factor = float(weight) * self._scale
        known = norm <= 0.99 * self.bound  # a norm in float32 is a little off
        if not all(shared(self.size, lambda share: self._fold(np.add, delta, factor, share, known))):
            if self.added:  # modulo 2^64 this takes back garbage, too
                shared(self.size, lambda share: self._fold(np.subtract, delta, factor, share, known=True))
            raise OverflowError(f"an element of the update is above bound={self.bound} or not a number")
        self.added += 1

    def mean(self, divisor: float, out: np.ndarray | None = None) -> np.ndarray:
        """(size,) float32: the sum divided by `divisor`, or zeros where nothing was added."""
        out = np.empty(self.size, np.float32) if out is None else out
        if self.added == 0:
            out.fill(0)
            return out
        if not 0 < divisor < math.inf:
            raise ValueError(f"divisor={divisor} must be a number above 0")
        offset = np.uint64(self.added * MAGIC_BITS % 2**64)
        buffer, quotient = np.empty(PIECE, np.uint64), np.empty(PIECE)
        for part in _chunks(range(self.size), PIECE):
            total = self._sum[part].view(np.uint64)
            whole = buffer[: total.size]
            np.subtract(total, offset, out=whole)
            np.divide(whole.view(np.int64), divisor * self._scale, out=quotient[: total.size])
            out[part] = quotient[: total.size]
        return out

    def _fold(self, operation: np.ufunc, delta: np.ndarray, factor: float, share: range, known: bool) -> bool:
        """Apply add or subtract to a part of the accumulator; whether every element is within the bound."""
        fits, buffer = True, np.empty(min(CHUNK, len(share)))
        with np.errstate(all="ignore"):  # garbage is computed before it is refused
            for part in _chunks(share, CHUNK):
                piece, total = delta[part], self._sum[part]
                real = buffer[: piece.size]
                # no element is longer than its chunk: one fast pass, and two exact ones only where that is long
                if not (known or float(np.dot(piece, piece)) <= 0.99 * self.bound**2):
                    fits &= bool(piece.max() <= self.bound and piece.min() >= -self.bound)  # False for NaN
                real[...] = piece
                np.multiply(real, factor, out=real)
                np.add(real, MAGIC, out=real)
                if self.added == 0:
                    total[...] = real.view(np.int64)  # no zero fill
                else:
                    operation(total, real.view(np.int64), out=total)
        return fits


def _chunks(share: range, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, share.stop)) for start in share[::length])
