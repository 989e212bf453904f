"""Dense compression of a delta: every element is kept, in fewer bits.

    bf16   the upper half of a float32, rounded to nearest even
    int-b  s = max|x_b| / (2^(b-1) - 1), q = round(x / s), for each block of the flat delta
    e3m0   sign and a power of two down from the block's maximum (1, 1/2, .. 1/64) or zero; Streaming DiLoCo, 2501.18512

A blockwise payload is the float32 scales of all blocks, then the codes: nothing in it says how long
it is, the server knows. Deltas only, uplink only: errors on the weights themselves would add up
from version to version.

A scale has a floor, which a block of zeros gets: nothing is divided by zero, and no quantised value
is denormal. Then quantising what was quantised finds the same scale again and changes nothing:
fl(fl(fl(m / L) L) / L) = fl(m / L) holds for every float32 m where nothing overflows (tried for all
mantissas, L = 7 and 127).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import ConfigError, UpdateRejected

# elements worked on at a time: with their scratch space they stay in one core's cache
CHUNK = 1 << 17
MAX = np.finfo(np.float32).max
LARGEST = 0x7F7FFFFF  # its bits; magnitudes above are infinities and NaN
FLOOR = 2.0**-126  # the smallest normal float32


@dataclass(frozen=True)
class BF16:
    """The upper 16 bits of each float32, rounded to nearest even; beyond the largest bfloat16 is
    cut to it.
    """

    name: ClassVar[str] = "bf16"

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements, exactly."""
        return 2 * size

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (2 n,) uint8."""
        payload = np.empty(self.most_bytes(delta.size), np.uint8)
        halves = payload.view("<u2")
        for start in range(0, delta.size, CHUNK):
            halves[start : start + CHUNK] = round_bf16(delta[start : start + CHUNK])
        return payload

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(2 n,) uint8 -> (n,) float32, or UpdateRejected."""
        halves = received(payload, self.most_bytes(size)).view("<u2")
        values = np.empty(size, np.float32)
        bits = values.view(np.uint32)
        for start in range(0, size, CHUNK):
            bits[start : start + CHUNK] = halves[start : start + CHUNK]
            bits[start : start + CHUNK] <<= 16
        refuse_non_finite(values)
        return values


def bf16_rounded(values: np.ndarray) -> np.ndarray:
    """(n,) float32 rounded to bfloat16, as float32."""
    codec = BF16()
    return codec.decode(codec.encode(values), values.size)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as uint16 bits of the same shape; NaN and infinities become
    NaN.
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


class Blockwise:
    """What the blockwise codecs share: a plane of scales, a plane of codes, and the checks of
    both.
    """

    name: ClassVar[str]
    bits: ClassVar[int]  # of a code
    top: ClassVar[int]  # the largest code in units of the scale
    floor: ClassVar[float] = FLOOR  # of a scale
    block: int

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

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements, exactly: codes without gaps and 4 for each
        block.
        """
        return 4 * -(-size // self.block) + -(-size * self.bits // 8)

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (most_bytes(n),) uint8; the same bytes for the same delta."""
        payload = np.empty(self.most_bytes(delta.size), np.uint8)
        scales, codes = self._planes(payload, delta.size)
        # what is not finite makes its scale so: the server refuses
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
        """(most_bytes(n),) uint8 -> (n,) float32, or UpdateRejected."""
        scales, codes = self._planes(received(payload, self.most_bytes(size)), size)
        self._check_scales(scales)
        values = np.empty(size, np.float32)
        for start, stop, width in rows(size, self.block):
            part = values[start:stop]
            self._units(codes[start * self.bits // 8 : -(-stop * self.bits // 8)], part)
            first = start // self.block
            part = part.reshape(-1, width)
            part *= scales[first : first + len(part), None]
        return values

    def _planes(self, payload: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        cut = 4 * -(-size // self.block)
        return payload[:cut].view("<f4"), payload[cut:]

    def _check_scales(self, scales: np.ndarray) -> None:
        """Bits of a float32 order as its value: one comparison finds signs, infinities, NaN and
        what would overflow.
        """
        bits = scales.view("<u4")
        if (bits > self.limit.view(np.uint32)).any():
            if ((bits & 0x7FFFFFFF) > LARGEST).any():
                raise UpdateRejected("non_finite", "scale")
            raise UpdateRejected("bad_encoding", "scale below 0 or too large")

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        """Codes of part (rows, width) by scale (rows, 1); scratch (rows, width) holds |part| and
        may be overwritten.
        """
        raise NotImplementedError

    def _units(self, codes: np.ndarray, values: np.ndarray) -> None:
        """Write the values in units of the scale, or UpdateRejected for a code that no encoder
        writes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Int8(Blockwise):
    """Codes -127 .. 127 of 8 bits; 25.10 % of float32 with blocks of 1024, relative L2 error on
    Gaussians 0.79 %.
    """

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    top: ClassVar[int] = 127

    block: int = 1024  # elements

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        np.divide(part, scale, out=scratch)
        np.copyto(codes.view(np.int8), np.rint(scratch, out=scratch).ravel(), casting="unsafe")

    def _units(self, codes: np.ndarray, values: np.ndarray) -> None:
        if (codes == 0x80).any():
            raise UpdateRejected("bad_encoding", "code -128")
        values[:] = codes.view(np.int8)


@dataclass(frozen=True)
class Int4(Blockwise):
    """Codes -7 .. 7 of 4 bits, two's complement; 12.89 % of float32 with blocks of 256, error on
    Gaussians 12.6 %.
    """

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    top: ClassVar[int] = 7

    block: int = 256  # elements

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        np.divide(part, scale, out=scratch)
        codes[:] = pack_nibbles(np.rint(scratch, out=scratch).astype(np.int8).ravel())

    def _units(self, codes: np.ndarray, values: np.ndarray) -> None:
        unpack_nibbles(codes, INTEGERS, values)


@dataclass(frozen=True)
class E3M0(Blockwise):
    """Sign and one of 1, 1/2, .. 1/64 of the block's maximum, or zero, the nearest; error on
    Gaussians 19.5 %.
    """

    name: ClassVar[str] = "e3m0"
    bits: ClassVar[int] = 4
    top: ClassVar[int] = 1
    floor: ClassVar[float] = FLOOR * 64  # so that 1/64 of it is normal

    block: int = 256  # elements

    def _quantise(
        self, part: np.ndarray, scale: np.ndarray, scratch: np.ndarray, codes: np.ndarray
    ) -> None:
        scratch /= scale  # 0 .. 1
        above_zero = scratch > 2.0**-7
        power = scratch.view(np.int32)
        power += 1 << 22  # half a mantissa: from 1.5 on a value counts as the next power of two
        power >>= 23  # now the exponent, 127 for a ratio of 1
        power -= 120  # 7 for 1, .. 1 for 1/64
        # between 1/128 and 3/256 the power is 0, but 1/64 is nearest
        code = np.maximum(power, above_zero).astype(np.int8)
        code |= np.signbit(part).view(np.int8) << 3
        code *= code != 8  # one zero only
        codes[:] = pack_nibbles(code.ravel())

    def _units(self, codes: np.ndarray, values: np.ndarray) -> None:
        unpack_nibbles(codes, POWERS, values)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """The lower 4 bits of (n,) int8, two in a byte, first in the lower half; an odd end is filled
    with 0.
    """
    if codes.size % 2:
        codes = np.append(codes, np.int8(0))
    pairs = codes.view("<u2")  # both codes of a byte in one word: no strided access
    return ((pairs & 0x0F) | (pairs >> 4 & 0xF0)).astype(np.uint8)


def unpack_nibbles(packed: np.ndarray, table: np.ndarray, values: np.ndarray) -> None:
    """Write (n,) float32 values of (ceil(n / 2),) uint8 by a table (256, 2); code 8 does not
    exist.
    """
    if ((packed & 0x0F) == 0x08).any() or ((packed & 0xF0) == 0x80).any():
        raise UpdateRejected("bad_encoding", "code 8")
    even = values.size // 2 * 2
    np.take(table, packed[: even // 2], axis=0, out=values[:even].reshape(-1, 2), mode="clip")
    if even < values.size:
        if packed[-1] >> 4:
            raise UpdateRejected("bad_encoding", "bits behind the last code")
        values[-1] = table[packed[-1], 0]


def pairs_of(units: list[float]) -> np.ndarray:
    """(256, 2) float32: both values of a byte, from the value of each of the 16 codes."""
    nibbles = np.array(units, np.float32)
    return np.stack([np.tile(nibbles, 16), np.repeat(nibbles, 16)], axis=1)


INTEGERS = pairs_of([float(code - 16 * (code >= 8)) for code in range(16)])
POWERS = pairs_of(
    [
        (-1.0 if code >= 8 else 1.0) * (2.0 ** (code % 8 - 7) if code % 8 else 0.0)
        for code in range(16)
    ]
)


def rows(size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, width) of slices that are whole rows, at most CHUNK elements or one block; the
    last is a short row.

    >>> list(rows(5 * 65536 + 3, 65536))
    [(0, 131072, 65536), (131072, 262144, 65536), (262144, 327680, 65536), (327680, 327683, 3)]
    """
    whole = size // block * block
    step = max(block, CHUNK // block * block)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), block
    if whole < size:
        yield whole, size, size - whole


def received(payload: object, count: int) -> np.ndarray:
    """A payload of exactly `count` bytes as (count,) uint8, or UpdateRejected: the first check of
    every decoder.
    """
    if not isinstance(payload, np.ndarray):
        raise UpdateRejected("bad_encoding", f"payload is {type(payload).__name__}, not an array")
    if payload.dtype != np.uint8:
        raise UpdateRejected("wrong_dtype", f"{payload.dtype.str}, expected bytes")
    if payload.ndim != 1:
        raise UpdateRejected("wrong_shape", f"{payload.shape}, expected ({count},)")
    if payload.size != count:
        raise UpdateRejected("size_mismatch", f"{payload.size} bytes, expected {count}")
    return np.ascontiguousarray(payload)


def refuse_non_finite(values: np.ndarray) -> None:
    """UpdateRejected if (n,) float32 holds a NaN or an infinity."""
    bits = values.view(np.uint32)
    for start in range(0, values.size, CHUNK):
        if (bits[start : start + CHUNK] & 0x7FFFFFFF).max() > LARGEST:
            raise UpdateRejected("non_finite")
