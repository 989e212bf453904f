"""The largest elements of a delta by magnitude, for the codecs that send only those.

Magnitudes are compared as integers: without the sign bit, the bits of float32 have the same order
as the values. NaN is the largest, so it is sent and the server rejects it.
"""

from __future__ import annotations

import math

import numpy as np

from fedgpt.update.codecs.base import CHUNK

MAGNITUDE = 0x7FFFFFFF  # all bits of a float32 except the sign


def largest_of_all(values: np.ndarray, kept: int) -> np.ndarray:
    """Return the positions of the largest of (n,) float32 bits, (kept,) rising; 0 < kept <= n.

    Of equal magnitudes the first are chosen. Selecting from all elements is slow, so a lower bound
    from a sample reduces the candidates. If the bound is too high, all elements are candidates.
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
    """Return the columns of the largest of each row of (rows, width), (rows, kept) rising.

    Of equal integers the first are taken.
    """
    least = np.partition(magnitudes, -kept, axis=1)[:, -kept, None]  # (rows, 1)
    chosen = magnitudes >= least
    crowded = np.flatnonzero(chosen.sum(axis=1) > kept)
    if crowded.size:  # more equal integers than places for them
        magnitudes, least = magnitudes[crowded], least[crowded]
        above, equal = magnitudes > least, magnitudes == least
        places = kept - above.sum(axis=1, keepdims=True)
        chosen[crowded] = above | (equal & (np.cumsum(equal, axis=1) <= places))
    return np.flatnonzero(chosen).reshape(-1, kept) % magnitudes.shape[1]
