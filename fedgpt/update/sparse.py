"""Sparse compression of a delta: only its largest elements are sent. Without error feedback the
loss suffers badly.

    topk         the largest of the whole delta: float32 values, positions in Elias-Fano code (Elias 1974, Fano 1971)
    sparse_loco  the 64 largest of every 4096: 12-bit positions, 2-bit values (2508.15706): 141 times smaller

Elias-Fano: of k rising positions below n, each one's lower l = floor(log2(n / k)) bits are stored
as they are, and position i sets bit (position >> l) + i of a bitmap: 2 + log2(n / k) bits each, a
length that follows from n and k, and no way to write a position twice but in neighbours, where a
comparison finds it.

A 2-bit value is a sign and one of two magnitudes of its chunk: the means of those above and not
above the mean, both bfloat16, in the 32 bits of one float32 scale. (On Gaussians half the error of
one scale and a fixed ratio.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import ConfigError, UpdateRejected
from fedgpt.update.blockwise import CHUNK, received, refuse_non_finite, round_bf16, rows

# all bits of a float32 but its sign: as integers they order as |x| does, NaN last
MAGNITUDE = 0x7FFFFFFF
WIDTH, KEPT = 4096, 64  # of sparse_loco: elements in a chunk, and those of them that are sent
ENTRY = 14  # bits: a position in the chunk, then which magnitude, then the sign


@dataclass(frozen=True)
class TopK:
    """The largest `density` of all elements, as float32 values and their positions; 1.95 % of
    float32 at 1/64.
    """

    name: ClassVar[str] = "topk"

    density: float = 1 / 64  # share of the elements that is sent

    def __post_init__(self) -> None:
        value = self.density
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ConfigError(
                f"update.density={value}: expected a number above 0 and at most 1 (share that is"
                " sent)"
            )

    def kept(self, size: int) -> int:
        """How many of `size` elements are sent: at least one, if there is one."""
        return min(size, max(1, round(self.density * size)))

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements, exactly."""
        kept = self.kept(size)
        low, bitmap = elias_fano(size, kept)
        return 4 * kept + -(-low * kept // 8) + -(-bitmap // 8)

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (most_bytes(n),) uint8; of equal magnitudes the first are sent."""
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
        """(most_bytes(n),) uint8 -> (n,) float32, or UpdateRejected."""
        payload = received(payload, self.most_bytes(size))
        dense = np.zeros(size, np.float32)
        kept = self.kept(size)
        if not kept:
            return dense
        values = payload[: 4 * kept].view("<f4").astype(np.float32)
        refuse_non_finite(values)
        low, bitmap = elias_fano(size, kept)
        split = 4 * kept + -(-low * kept // 8)
        marks = np.flatnonzero(np.unpackbits(payload[split:]))
        if marks.size != kept or marks[-1] >= bitmap:
            raise UpdateRejected("bad_encoding", f"{marks.size} positions, expected {kept}")
        where = (marks - np.arange(kept)) << low
        where |= unpack_bits(payload[4 * kept : split], kept, low)
        if where[-1] >= size or not (where[1:] > where[:-1]).all():
            raise UpdateRejected("bad_encoding", "positions do not rise, or leave the delta")
        dense[where] = values
        return dense


@dataclass(frozen=True)
class SparseLoCo:
    """The 64 largest of each 4096 elements, 14 bits each; for error feedback with beta .95 and a
    plain server step.
    """

    name: ClassVar[str] = "sparse_loco"

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements, exactly: 116 for a chunk; a short last one keeps
        as great a share.
        """
        return 4 * -(-size // WIDTH) + -(-ENTRY * kept_of(size) // 8)

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (most_bytes(n),) uint8; of equal magnitudes the first are sent."""
        levels = np.empty((-(-delta.size // WIDTH), 2), np.uint16)
        entries = np.empty(kept_of(delta.size), np.uint16)
        for start, stop, width in rows(delta.size, WIDTH):
            part = np.ascontiguousarray(delta[start:stop], np.float32).reshape(-1, width)
            chunk, kept = start // WIDTH, kept_of(width)
            found, levels[chunk : chunk + len(part)] = two_levels(part, kept)
            entries[chunk * KEPT : chunk * KEPT + found.size] = found.ravel()
        return np.concatenate(
            [levels.astype("<u2").view(np.uint8).ravel(), pack_bits(entries, ENTRY)]
        )

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(most_bytes(n),) uint8 -> (n,) float32, or UpdateRejected."""
        payload = received(payload, self.most_bytes(size))
        dense = np.zeros(size, np.float32)
        chunks = -(-size // WIDTH)
        levels = checked_levels(payload[: 4 * chunks].view("<u2").reshape(chunks, 2))
        entries = unpack_bits(payload[4 * chunks :], kept_of(size), ENTRY)
        whole = size // WIDTH
        scatter(
            entries[: whole * KEPT].reshape(whole, KEPT),
            levels[:whole],
            dense[: whole * WIDTH].reshape(whole, WIDTH),
        )
        if whole < chunks:
            scatter(entries[None, whole * KEPT :], levels[whole:], dense[None, whole * WIDTH :])
        return dense


def kept_of(size: int) -> int:
    """Elements that sparse_loco sends of `size`: 64 of each whole chunk, one for each started 64 of
    the last.

    >>> kept_of(4096), kept_of(4096 + 65), kept_of(0)
    (64, 66, 0)
    """
    return -(-size // (WIDTH // KEPT))


def two_levels(part: np.ndarray, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """(entries (rows, kept) uint16, magnitudes (rows, 2) bfloat16 bits) of part (rows, width)
    float32.

    A chunk with fewer than `kept` elements that are not zero ends with entries of all zero bits.
    """
    # (rows, kept) rising in each row
    where = largest_of_rows(part.view(np.int32) & MAGNITUDE, kept)
    values = np.take_along_axis(part, where, axis=1)
    absent = values == 0
    if absent.any():
        order = np.argsort(absent, axis=1, kind="stable")
        where, values, absent = (
            np.take_along_axis(x, order, axis=1) for x in (where, values, absent)
        )
    size = np.abs(values).astype(np.float64)
    present = np.maximum(kept - absent.sum(axis=1), 1)
    high = size > (size.sum(axis=1) / present)[:, None]
    count = high.sum(axis=1)
    lower = size.sum(axis=1, where=~high) / np.maximum(present - count, 1)
    upper = np.where(count, size.sum(axis=1, where=high) / np.maximum(count, 1), lower)
    entries = (where | high * WIDTH | np.signbit(values) * 2 * WIDTH) * ~absent
    return entries.astype(np.uint16), round_bf16(np.stack([lower, upper], axis=1))


def checked_levels(levels: np.ndarray) -> np.ndarray:
    """(chunks, 2) bfloat16 bits -> float32: finite, not negative, the lower first; or
    UpdateRejected.
    """
    if ((levels & 0x7F80) == 0x7F80).any():
        raise UpdateRejected("non_finite", "scale")
    if (levels >= 0x8000).any() or (levels[:, 0] > levels[:, 1]).any():
        raise UpdateRejected("bad_encoding", "scale below 0, or two in the wrong order")
    return (levels.astype(np.uint32) << 16).view(np.float32)


def scatter(entries: np.ndarray, levels: np.ndarray, dense: np.ndarray) -> None:
    """Write entries (rows, kept) with magnitudes (rows, 2) into zeros (rows, width), or
    UpdateRejected.
    """
    where = entries & (WIDTH - 1)
    if where.size and where.max() >= dense.shape[1]:
        raise UpdateRejected("bad_encoding", "a position leaves the delta")
    values = np.take_along_axis(levels, (entries >> 12 & 1).astype(np.intp), axis=1)
    values *= 1 - 2 * (entries >> 13).astype(np.float32)
    rising = where[:, 1:] > where[:, :-1]
    if not rising.all():  # the rest of a row may be absent: zero bits that write nothing
        rising = np.logical_and.accumulate(rising, axis=1)
        if entries[:, 1:][~rising].any():
            raise UpdateRejected("bad_encoding", "positions do not rise")
        where[:, 1:] = np.where(rising, where[:, 1:], where[:, :1])  # the first once more
        values[:, 1:] = np.where(rising, values[:, 1:], values[:, :1])
    np.put_along_axis(dense, where.astype(np.intp), values, axis=1)


def largest_of_all(values: np.ndarray, kept: int) -> np.ndarray:
    """(kept,) rising positions of the largest magnitudes of (n,) float32 bits, 0 < kept <= n; the
    first of equals.

    Selection is slow, so a lower bound from a sample leaves few candidates; where it does not, all
    are.
    """
    size = values.size
    sample = values[:: max(1, size >> 16)] & MAGNITUDE
    share = kept * sample.size / size
    rank = int(1.1 * share + 4 * math.sqrt(share) + 1)
    bound = (
        0 if rank >= sample.size else np.partition(sample, sample.size - rank)[sample.size - rank]
    )
    pieces = [
        at + np.flatnonzero((values[at : at + CHUNK] & MAGNITUDE) >= bound)
        for at in range(0, size, CHUNK)
    ]
    candidates = np.concatenate(pieces)
    if candidates.size < kept:
        candidates = np.arange(size)
    return candidates[largest_of_rows(values[None, candidates] & MAGNITUDE, kept)[0]]


def largest_of_rows(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """(rows, kept) rising columns of the largest of (rows, width) integers; of equals the first."""
    least = np.partition(magnitudes, -kept, axis=1)[:, -kept, None]  # (rows, 1)
    chosen = magnitudes >= least
    crowded = np.flatnonzero(chosen.sum(axis=1) > kept)
    if crowded.size:  # more equals than places
        magnitudes, least = magnitudes[crowded], least[crowded]
        above, equal = magnitudes > least, magnitudes == least
        places = kept - above.sum(axis=1, keepdims=True)
        chosen[crowded] = above | (equal & (np.cumsum(equal, axis=1) <= places))
    return np.flatnonzero(chosen).reshape(-1, kept) % magnitudes.shape[1]


def elias_fano(size: int, kept: int) -> tuple[int, int]:
    """(l, length of the bitmap in bits) for `kept` positions below `size`.

    >>> elias_fano(6400, 100)
    (6, 199)
    """
    low = (size // kept).bit_length() - 1 if kept else 0
    return low, kept + ((size - 1) >> low) if kept else 0


def pack_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """The lower `width` bits of (n,) numbers as (ceil(n width / 8),) uint8: all lowest bits, then
    the next ones, ..
    """
    planes = np.empty((width, numbers.size), np.uint8)
    for bit in range(width):
        planes[bit] = numbers >> bit & 1
    return np.packbits(planes)


def unpack_bits(packed: np.ndarray, count: int, width: int) -> np.ndarray:
    """(count,) numbers, uint16 or int64 as they need, of pack_bits' bytes; UpdateRejected for bits
    behind them.
    """
    bits = np.unpackbits(packed)
    if bits[count * width :].any():
        raise UpdateRejected("bad_encoding", "bits behind the last position")
    numbers = np.zeros(count, np.uint16 if width <= 16 else np.int64)
    for bit in range(width):
        numbers |= bits[bit * count : (bit + 1) * count].astype(numbers.dtype) << bit
    return numbers
