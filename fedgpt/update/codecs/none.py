"""update=none: no compression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedgpt.update.codecs.base import Codec, received, refuse_non_finite


@dataclass(frozen=True)
class Plain(Codec):
    """The float32 bytes as they are."""

    def payload_bytes(self, size: int) -> int:
        """Four bytes an element."""
        return 4 * size

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (4 n,) uint8."""
        return delta.astype("<f4").view(np.uint8)

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(4 n,) uint8 -> (n,) float32, or UpdateRejected."""
        values = received(payload, self.payload_bytes(size)).view("<f4").astype(np.float32)
        refuse_non_finite(values)
        return values
