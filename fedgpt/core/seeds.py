"""Stateless randomness: every draw has its own seed, so nothing about it needs saving.

A retried task, a resumed run and another runtime give the same bits because the seed depends only
on what is drawn, never on what was drawn before.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(run_seed: int, purpose: str, *parts: str | int) -> int:
    """63-bit seed = sha256(run seed, purpose, parts); an attempt number must not be among the
    parts.

    >>> derive_seed(0, "batches", "alice", 3) == derive_seed(0, "batches", "alice", 3)
    True
    """
    text = "\x1f".join(str(part) for part in (run_seed, purpose, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(run_seed: int, purpose: str, *parts: str | int) -> np.random.Generator:
    """A fresh numpy generator for one purpose."""
    return np.random.Generator(np.random.PCG64(derive_seed(run_seed, purpose, *parts)))
