"""All codecs, the built-in ones and one from outside, and the deltas that they are tested with."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from support import third_party

from fedgpt.update.codecs.base import MAX, Codec
from fedgpt.update.compress import make_codec

FAMILY = [
    make_codec("none"),
    make_codec("bf16"),
    *[make_codec("int8", block=block) for block in (16, 256, 1024)],
    *[make_codec("int4", block=block) for block in (16, 64, 256)],
    *[make_codec("e3m0", block=block) for block in (16, 256)],
    *[make_codec("topk", density=density) for density in (1 / 64, 0.3, 1.0)],
    make_codec("sparse_loco"),
    import_module(third_party.MODULE).Sign(step=0.25),
]
INTEGER = [codec for codec in FAMILY if codec.name in ("int8", "int4")]
every_codec = pytest.mark.parametrize("codec", FAMILY, ids=repr)

SIZES = [
    0,
    1,
    2,
    3,
    15,
    16,
    17,
    63,
    64,
    65,
    127,
    129,
    255,
    256,
    257,
    1023,
    1025,
    4095,
    4096,
    4097,
    5000,
    8192 + 65,
]
KINDS = ("gaussian", "heavy", "any bits", "denormal", "huge", "zeros", "spike", "ties", "few")


def delta_of(size: int, kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size).astype(np.float32)
    if kind == "heavy":
        x = rng.standard_t(1.5, size).astype(np.float32)
    elif kind == "any bits":
        x = rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32)
        x[~np.isfinite(x)] = -0.0
    elif kind == "denormal":
        x = (
            rng.integers(0, 2**20, size, dtype=np.uint32)
            >> rng.integers(0, 20, size, dtype=np.uint32)
        ).view(np.float32)
    elif kind == "huge":
        x = np.sign(x) * MAX * rng.choice(np.array([1, 1, 0.99, 0.5], np.float32), size)
    elif kind == "zeros":
        x = np.zeros(size, np.float32)
    elif kind == "spike":
        x *= np.float32(1e-3)
        x[size // 2 : size // 2 + 1] = -1e6
    elif kind == "ties":
        x = np.round(x)
    elif kind == "few":
        x[rng.random(size) < 0.995] = 0
    return x.astype(np.float32)


def through(codec: Codec, delta: np.ndarray) -> np.ndarray:
    return codec.decode(codec.encode(delta), delta.size)
