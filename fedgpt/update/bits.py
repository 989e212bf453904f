"""Arrays and bits: packing small numbers into bytes, rounding to bfloat16, rows of blocks.

All functions here work on complete arrays; none of them knows a codec.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedgpt.core.errors import UpdateRejected
from fedgpt.update.codecs.base import CHUNK, LARGEST


def rows(size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """Cut `size` elements into slices of complete blocks: yield (start, stop, width of a block).

    A slice has at most CHUNK elements, or one block. A shorter last block is a slice of its own.

    >>> list(rows(5 * 65536 + 3, 65536))
    [(0, 131072, 65536), (131072, 262144, 65536), (262144, 327680, 65536), (327680, 327683, 3)]
    """
    complete = size // block * block
    step = max(block, CHUNK // block * block)
    for start in range(0, complete, step):
        yield start, min(start + step, complete), block
    if complete < size:
        yield complete, size, size - complete


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Return the nearest bfloat16, ties to even, as uint16 bits of the same shape.

    NaN and infinities become NaN; a value beyond the largest bfloat16 becomes the largest bfloat16.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    halves = rounded.astype(np.uint16)
    magnitude = bits & 0x7FFFFFFF
    # rounding went up to infinity, or was never finite
    if magnitude.size and magnitude.max() >= 0x7F7F8000:
        beyond = magnitude >= 0x7F7F8000
        sign = (bits[beyond] >> 16) & 0x8000
        halves[beyond] = sign | np.where(magnitude[beyond] <= LARGEST, 0x7F7F, 0x7FC0)
    return halves


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack the lower 4 bits of (n,) int8 into (ceil(n / 2),) uint8, the first in the lower half.

    Where n is odd, the last half byte is 0.
    """
    if codes.size % 2:
        codes = np.append(codes, np.int8(0))
    pairs = codes.view("<u2")  # both codes of a byte in one word: no strided access
    return ((pairs & 0x0F) | (pairs >> 4 & 0xF0)).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, table: np.ndarray, values: np.ndarray) -> None:
    """Write to (n,) float32 `values` the two values in `table` (256, 2) of each byte of `packed`.

    Code 8, minus zero, is refused by UpdateRejected: no encoder writes it.
    """
    if ((packed & 0x0F) == 0x08).any() or ((packed & 0xF0) == 0x80).any():
        raise UpdateRejected("bad_encoding", "code 8")
    even = values.size // 2 * 2
    np.take(table, packed[: even // 2], axis=0, out=values[:even].reshape(-1, 2), mode="clip")
    if even < values.size:
        if packed[-1] >> 4:
            raise UpdateRejected("bad_encoding", "bits after the last code")
        values[-1] = table[packed[-1], 0]


def pairs_of(units: list[float]) -> np.ndarray:
    """Return the table (256, 2) float32 of a byte's two values, given those of the 16 codes."""
    nibbles = np.array(units, np.float32)
    return np.stack([np.tile(nibbles, 16), np.repeat(nibbles, 16)], axis=1)


def pack_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """Pack the lower `width` bits of (n,) numbers into (ceil(n width / 8),) uint8.

    First come the lowest bits of all numbers, then the next ones, and so on.
    """
    planes = np.empty((width, numbers.size), np.uint8)
    for bit in range(width):
        planes[bit] = numbers >> bit & 1
    return np.packbits(planes)


def unpack_bits(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """Return the (count,) numbers that `pack_bits` packed, as uint16, or int64 where they need it.

    Raises UpdateRejected if a bit after the last number is set.
    """
    bits = np.unpackbits(packed)
    if bits[count * width :].any():
        raise UpdateRejected("bad_encoding", "bits after the last position")
    numbers = np.zeros(count, np.uint16 if width <= 16 else np.int64)
    for bit in range(width):
        numbers |= bits[bit * count : (bit + 1) * count].astype(numbers.dtype) << bit
    return numbers
