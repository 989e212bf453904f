"""update=bf16: the upper half of each float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.update.bits import round_bf16
from fedgpt.update.codecs.base import CHUNK, Codec, received, refuse_non_finite


@dataclass(frozen=True)
class BF16(Codec):
    """Each element as a bfloat16, rounded to nearest, ties to even; 50 % of float32.

    A value beyond the largest bfloat16 becomes the largest one.
    """

    def payload_bytes(self, size: int) -> int:
        """Two bytes an element."""
        return 2 * size

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (2 n,) uint8."""
        payload = np.empty(self.payload_bytes(delta.size), np.uint8)
        halves = payload.view("<u2")
        for start in range(0, delta.size, CHUNK):
            halves[start : start + CHUNK] = round_bf16(delta[start : start + CHUNK])
        return payload

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(2 n,) uint8 -> (n,) float32, or UpdateRejected."""
        halves = received(payload, self.payload_bytes(size)).view("<u2")
        values = np.empty(size, np.float32)
        bits = values.view(np.uint32)
        for start in range(0, size, CHUNK):
            bits[start : start + CHUNK] = halves[start : start + CHUNK]
            bits[start : start + CHUNK] <<= 16
        refuse_non_finite(values)
        return values


def bf16_rounded(values: np.ndarray) -> np.ndarray:
    """Return (n,) float32 rounded to bfloat16, as float32."""
    codec = BF16()
    return codec.decode(codec.encode(values), values.size)
