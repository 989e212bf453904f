"""The number formats of GGUF's tensors that fedgpt reads, and their values as float32.

Quantised formats store 32 consecutive values of a row as one block: a float16 scale, a float16
minimum in Q4_1, and a small integer for each value. Layouts: block_q8_0, block_q4_0 and block_q4_1
in ggml-common.h of ggml (https://github.com/ggml-org/ggml).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# all types by their number, for messages; 4, 5, 31 to 33 and 36 to 38 were withdrawn
TYPES = (
    *("F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K"),
    *("Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S"),
    *("IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8"),
    *("Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"),
    *("NVFP4", "Q1_0"),
)
Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
# byte i of `pairs` holds value i in its low half, and value 16 + i in its high half
Q4_0 = np.dtype([("scale", "<f2"), ("pairs", "u1", 16)])
Q4_1 = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("pairs", "u1", 16)])


@dataclass(frozen=True)
class BlockFormat:
    """How a file stores consecutive values of a row."""

    name: str
    layout: np.dtype  # of one block
    values: int  # in one block
    decode: Callable[[np.ndarray], np.ndarray]  # blocks (n,) -> float32 (n,) or (n, values)


def dequantise(raw: np.ndarray, form: BlockFormat) -> np.ndarray:
    """The values in the bytes `raw` (a whole number of blocks) as float32, one-dimensional.

    Values that are not finite are returned as they are stored. Bit for bit what `gguf.dequantize`
    of llama.cpp's Python package returns.
    """
    with np.errstate(all="ignore"):  # infinity times 0, and conversions of NaN
        return form.decode(raw.view(form.layout)).reshape(-1)


def _float(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    # the upper half of a float32
    return (blocks.astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return blocks["values"] * _column(blocks["scale"])


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    values = _halves(blocks["pairs"])
    values -= 8
    values *= _column(blocks["scale"])
    return values


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    values = _halves(blocks["pairs"])
    values *= _column(blocks["scale"])
    values += _column(blocks["minimum"])
    return values


def _column(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32)[:, None]


def _halves(pairs: np.ndarray) -> np.ndarray:
    """The 4-bit numbers 0..15 of bytes (n, 16): all low halves, then all high ones, (n, 32)."""
    numbers = np.empty((len(pairs), 2, pairs.shape[1]), dtype=np.float32)
    numbers[:, 0] = pairs & 15
    numbers[:, 1] = pairs >> 4
    return numbers.reshape(len(pairs), -1)


FORMATS = {
    form.name: form
    for form in (
        BlockFormat("F32", np.dtype("<f4"), 1, _float),
        BlockFormat("F16", np.dtype("<f2"), 1, _float),
        BlockFormat("BF16", np.dtype("<u2"), 1, _bf16),
        BlockFormat("Q8_0", Q8_0, 32, _q8_0),
        BlockFormat("Q4_0", Q4_0, 32, _q4_0),
        BlockFormat("Q4_1", Q4_1, 32, _q4_1),
    )
}
