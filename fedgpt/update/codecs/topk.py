"""update=topk: only the largest elements of the delta, with their positions in Elias-Fano code.

Elias-Fano (Elias 1974, Fano 1971): of k rising positions below n, the lower l = floor(log2(n / k))
bits of each are stored as they are, and position i sets bit (position >> l) + i of a bitmap. That
is about 2 + log2(n / k) bits a position. The length follows from n and k, and one position can be
written twice only in neighbouring entries, where a comparison finds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import ConfigError, UpdateRejected
from fedgpt.update.bits import pack_bits, unpack_bits
from fedgpt.update.codecs.base import Codec, received, refuse_non_finite
from fedgpt.update.largest import largest_of_all


@dataclass(frozen=True)
class TopK(Codec):
    """The largest elements as float32 values with their positions; 1.95 % of float32 at 1/64.

    Without error feedback (`update.error_feedback`) the loss suffers badly.
    """

    density: float = 1 / 64  # share of the elements that is sent

    def __post_init__(self) -> None:
        value = self.density
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(
                f"update.density={value}: expected a number above 0 and at most 1 (share that is"
                " sent)"
            )

    def kept(self, size: int) -> int:
        """Return how many of `size` elements are sent: at least one, if there is one."""
        return min(size, max(1, round(self.density * size)))

    def payload_bytes(self, size: int) -> int:
        """Four bytes a value, l bits a position, and the bitmap."""
        kept = self.kept(size)
        low, bitmap = elias_fano(size, kept)
        return 4 * kept + -(-low * kept // 8) + -(-bitmap // 8)

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (payload_bytes(n),) uint8; of equal magnitudes the first are sent."""
        delta = np.ascontiguousarray(delta, np.float32)
        kept = self.kept(delta.size)
        if not kept:
            return np.empty(0, np.uint8)
        where = largest_of_all(delta.view(np.int32), kept)  # (k,) rising
        low, bitmap = elias_fano(delta.size, kept)
        marks = np.zeros(bitmap, np.uint8)
        marks[(where >> low) + np.arange(kept)] = 1
        planes = (
            delta[where].view(np.uint8),
            pack_bits(where & ((1 << low) - 1), low),
            np.packbits(marks),
        )
        return np.concatenate(planes)

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(payload_bytes(n),) uint8 -> (n,) float32, or UpdateRejected."""
        payload = received(payload, self.payload_bytes(size))
        dense = np.zeros(size, np.float32)
        kept = self.kept(size)
        if not kept:
            return dense
        values = payload[: 4 * kept].view("<f4").astype(np.float32)
        refuse_non_finite(values)
        low, _ = elias_fano(size, kept)
        split = 4 * kept + -(-low * kept // 8)
        marks = np.flatnonzero(np.unpackbits(payload[split:]))
        if marks.size != kept:
            raise UpdateRejected("bad_encoding", f"{marks.size} positions, expected {kept}")
        where = (marks - np.arange(kept)) << low
        where |= unpack_bits(payload[4 * kept : split], kept, low)
        if where[-1] >= size or not (where[1:] > where[:-1]).all():
            raise UpdateRejected("bad_encoding", "positions do not rise, or leave the delta")
        dense[where] = values
        return dense


def elias_fano(size: int, kept: int) -> tuple[int, int]:
    """Return (l, length of the bitmap in bits) for `kept` positions below `size`.

    >>> elias_fano(6400, 100)
    (6, 199)
    """
    low = (size // kept).bit_length() - 1 if kept else 0
    return low, kept + ((size - 1) >> low) if kept else 0
