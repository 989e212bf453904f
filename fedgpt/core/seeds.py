"""Stateless randomness: every draw has its own seed, so no generator state has to be saved.

A seed depends only on the purpose of the draw, not on earlier draws. So a retried job, a resumed
run and another runtime give the same bits.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(run_seed: int, purpose: str, *parts: str | int) -> int:
    """A 63-bit seed, sha256(run seed, purpose, parts).

    The parts name the draw, such as a client and its job number. The number of an attempt must not
    be among them: a retry must repeat the draw.

    >>> derive_seed(0, "batches", "alice", 3) == derive_seed(0, "batches", "alice", 3)
    True
    """
    text = "\x1f".join(str(part) for part in (run_seed, purpose, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """A new numpy generator for one purpose, seeded by `derive_seed`."""
    return np.random.Generator(np.random.PCG64(derive_seed(run_seed, purpose, *parts)))
