"""update=int8: whole numbers of 8 bits, scaled block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import UpdateRejected
from fedgpt.update.blockwise import Blockwise


@dataclass(frozen=True)
class Int8(Blockwise):
    """Codes -127 .. 127 of 8 bits: 25.10 % of float32; relative L2 error on Gaussians 0.79 %."""

    bits: ClassVar[int] = 8
    top: ClassVar[int] = 127

    block: int = 1024  # elements that share a scale

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        np.divide(part, scale, out=scratch)
        np.copyto(codes.view(np.int8), np.rint(scratch, out=scratch).ravel(), casting="unsafe")

    def _dequantise(self, codes: np.ndarray, values: np.ndarray) -> None:
        if (codes == 0x80).any():
            raise UpdateRejected("bad_encoding", "code -128")
        values[:] = codes.view(np.int8)
