"""Count sketches: small vectors that preserve inner products of updates, for metrics of updates
that the server has freed.

With a linear rule the server keeps no update, so pairwise cosines, or the angle between two server
steps, cannot be computed from the vectors. A count sketch (Charikar, Chen, Farach-Colton 2002) of a
few thousand numbers is enough: S(x)_b = sum over i with i mod width = b of sign_i x_i, and E <S(x),
S(y)> = <x, y> over the random signs. The signs are public, so a client can manipulate its sketch.
Therefore sketches are used for diagnostics only, not for the validation of updates.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedgpt.core.seeds import numpy_generator

# A prime. Weights repeat with the strides of their matrices: with a power of two as width, one
# outlying column of an embedding 128 wide would fall into 32 of 4,096 buckets; no stride shares a
# factor with a prime.
WIDTH = 4093
# rows of `width` elements in a chunk: with 4,093 its buffer (1 MiB) stays in the second-level cache
ROWS = 64


class Sketch:
    """A linear map from (size,) to (width,); a cosine of two sketches is off by about 1 /
    sqrt(width).

    >>> sketch = Sketch(size=4, width=3)
    >>> x = np.float32([3, 0, 0, 4])
    >>> (sketch.of(2 * x) == 2 * sketch.of(x)).all().item()
    True
    """

    def __init__(self, size: int, width: int = WIDTH, seed: int = 0):
        if size < 1 or width < 1:
            raise ValueError(f"no sketch of size={size} and width={width}: both must be 1 or more")
        self.size, self.width = size, width
        # 64 signs a draw
        raw = numpy_generator(seed, "sketch").bit_generator.random_raw(-(-size // 64))
        signs = np.unpackbits(np.asarray(raw, "<u8").view(np.uint8), count=size).view(np.int8)
        signs *= 2
        signs -= 1
        self._signs = signs  # (size,) of -1 and 1
        self._buffer = np.empty(min(size, ROWS * width), np.float32)

    def of(self, vector: np.ndarray) -> np.ndarray:
        """(width,) float64: the sketch of a (size,) float32 vector."""
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise ValueError(f"expected {self.size} float32, got {vector.shape} {vector.dtype}")
        buckets = np.zeros(self.width)
        for start in range(0, self.size, ROWS * self.width):
            piece = vector[start : start + ROWS * self.width]
            signed = np.multiply(
                piece, self._signs[start : start + piece.size], out=self._buffer[: piece.size]
            )
            whole = piece.size - piece.size % self.width
            # (rows, width) -> (width,)
            buckets += signed[:whole].reshape(-1, self.width).sum(axis=0)
            buckets[: piece.size - whole] += signed[whole:]
        return buckets


def cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """The cosine of the angle between two sketches (or vectors); None if one of them is zero.

    >>> cosine(np.array([1.0, 0.0]), np.array([3.0, 4.0]))
    0.6
    """
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return min(1.0, max(-1.0, float(a @ b) / norms)) if norms > 0 else None


def mean_pairwise_cosine(sketches: Iterable[np.ndarray]) -> float | None:
    """Mean cosine over all pairs, from one sum: |sum of k unit vectors|^2 = k + k (k - 1) * mean.

    Zero vectors have no direction and are excluded; None if fewer than two vectors remain.
    """
    k, total = 0, np.zeros(())
    for sketch in sketches:
        norm = float(np.linalg.norm(sketch))
        if norm > 0:
            k, total = k + 1, total + sketch / norm
    if k < 2:
        return None
    mean = (float(total @ total) - k) / (k * (k - 1))
    return min(1.0, max(-1.0 / (k - 1), mean))  # the range of such a mean, which rounding may leave
