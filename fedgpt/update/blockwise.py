"""The common part of int8, int4 and e3m0: a scale for each block, and a code for each element.

    int-b  s = max|x| / (2^(b-1) - 1) over a block x, code q = round(x / s), decoded to q s
    e3m0   s = max|x|, code = sign and the nearest of 1, 1/2, .. 1/64, 0 to |x| / s

The payload is the float32 scales of all blocks, then the codes without gaps.

The smallest scale is FLOOR, which is also the scale of a block of zeros. So there is no division by
zero, and no decoded value is denormal. It follows that compressing a decoded delta finds the same
scales again and changes nothing: fl(fl(fl(m / L) L) / L) = fl(m / L) for every float32 m where
nothing overflows (verified for all mantissas, with L = 7 and L = 127).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import ConfigError, UpdateRejected
from fedgpt.update.bits import rows
from fedgpt.update.codecs.base import LARGEST, MAX, Codec, received

FLOOR = 2.0**-126  # the smallest normal float32


class Blockwise(Codec):
    """A codec of scales and codes; a subclass defines the codes and their values."""

    bits: ClassVar[int]  # length of a code in bits
    top: ClassVar[int]  # the largest code in units of the scale
    floor: ClassVar[float] = FLOOR  # the smallest scale
    block: int  # elements that share a scale

    def __post_init__(self) -> None:
        block = self.block
        if type(block) is not int or not 16 <= block <= 65536 or block & (block - 1):
            raise ConfigError(
                f"update.block={block}: expected a power of two from 16 to 65536 (elements that"
                " share a scale)"
            )

    @property
    def limit(self) -> np.float32:
        """The largest scale whose largest multiple is finite."""
        limit = MAX / np.float32(self.top)
        with np.errstate(over="ignore"):
            return (
                limit
                if np.isfinite(limit * np.float32(self.top))
                else np.nextafter(limit, np.float32(0))
            )

    def payload_bytes(self, size: int) -> int:
        """Four bytes a block, and the codes without gaps."""
        return 4 * -(-size // self.block) + -(-size * self.bits // 8)

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (payload_bytes(n),) uint8."""
        payload = np.empty(self.payload_bytes(delta.size), np.uint8)
        scales, codes = self._planes(payload, delta.size)
        # a value that is not finite makes its block's scale not finite, which `decode` refuses
        with np.errstate(invalid="ignore", over="ignore"):
            for start, stop, width in rows(delta.size, self.block):
                part = np.ascontiguousarray(delta[start:stop], np.float32).reshape(-1, width)
                scratch = np.abs(part)
                scale = np.maximum(
                    scratch.max(axis=1) / np.float32(self.top), np.float32(self.floor)
                )
                np.minimum(scale, self.limit, out=scale, where=np.isfinite(scale))
                first = start // self.block
                scales[first : first + len(scale)] = scale
                ours = codes[start * self.bits // 8 : -(-stop * self.bits // 8)]
                self._quantise(part, scale[:, None], scratch, ours)
        return payload

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(payload_bytes(n),) uint8 -> (n,) float32, or UpdateRejected."""
        scales, codes = self._planes(received(payload, self.payload_bytes(size)), size)
        self._check_scales(scales)
        values = np.empty(size, np.float32)
        for start, stop, width in rows(size, self.block):
            part = values[start:stop]
            self._dequantise(codes[start * self.bits // 8 : -(-stop * self.bits // 8)], part)
            first = start // self.block
            part = part.reshape(-1, width)
            part *= scales[first : first + len(part), None]
        return values

    def _planes(self, payload: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        cut = 4 * -(-size // self.block)
        return payload[:cut].view("<f4"), payload[cut:]

    def _check_scales(self, scales: np.ndarray) -> None:
        """Raise UpdateRejected for a scale that is negative, not finite, or above the limit.

        The bits of a float32 order as its value, so one comparison finds all of these.
        """
        bits = scales.view("<u4")
        if (bits > self.limit.view(np.uint32)).any():
            if ((bits & 0x7FFFFFFF) > LARGEST).any():
                raise UpdateRejected("non_finite", "scale")
            raise UpdateRejected("bad_encoding", "scale below 0 or too large")

    @abstractmethod
    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        """Write the codes of part (rows, width), given its scale (rows, 1), to `codes`.

        scratch (rows, width) contains |part| and may be overwritten.
        """

    @abstractmethod
    def _dequantise(self, codes: np.ndarray, values: np.ndarray) -> None:
        """Write what `codes` stand for, in units of the scale, to `values`.

        Raises UpdateRejected for a code that no encoder writes.
        """
