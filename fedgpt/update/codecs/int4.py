"""update=int4: whole numbers of 4 bits, scaled block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.update.bits import pack_nibbles, pairs_of, unpack_nibbles
from fedgpt.update.blockwise import Blockwise

INTEGERS = pairs_of([float(code - 16 * (code >= 8)) for code in range(16)])


@dataclass(frozen=True)
class Int4(Blockwise):
    """Codes -7 .. 7 of 4 bits, two's complement: 12.89 % of float32; error on Gaussians 12.6 %."""

    bits: ClassVar[int] = 4
    top: ClassVar[int] = 7

    block: int = 256  # elements that share a scale

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        np.divide(part, scale, out=scratch)
        codes[:] = pack_nibbles(np.rint(scratch, out=scratch).astype(np.int8).ravel())

    def _dequantise(self, codes: np.ndarray, values: np.ndarray) -> None:
        unpack_nibbles(codes, INTEGERS, values)
