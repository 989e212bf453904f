"""Damaged messages: valid ones of every codec, changed at random.

`choose(n)` gives a number from 0 to n - 1: hypothesis draws it, a fuzzer reads it from its bytes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from support import third_party

from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Reply, Update
from fedgpt.update.codecs.base import Codec
from fedgpt.update.compress import CODECS as BUILT_IN
from fedgpt.update.compress import make_codec
from fedgpt.update.npy import read_npy
from fedgpt.update.wire import REASONS, Expected, decode, digest, encode

SIZE, TOKENS, LIMIT = 5000, 640, 50.0
DELTA = np.random.default_rng(0).standard_normal(SIZE).astype(np.float32) / 10
CODECS: list[Codec] = [
    *(make_codec(name) for name in BUILT_IN.names()),
    import_module(third_party.MODULE).Sign(step=0.25),
]
GOOD = [
    encode("run", Update("alice", 3, 5, DELTA, 512, {"train_loss": 2.5}), codec) for codec in CODECS
]
JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    5,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    3.0,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "run",
    "alice",
    "none",
    "int8",
    "topk",
    "0" * 64,
    "\x00",
    "é" * 50,
    [],
    [5],
    {},
    {"a": 1},
    {"train_loss": "x"},
    {"train_loss": float("nan")},
    {"x" * 500: 1.0},
    {str(i): 1.0 for i in range(50)},
]
DTYPES = ("<f4", ">f4", "<f8", "<f2", "<i8", "<u4", "u1", "i1", "?", "<c8", "<M8[s]", "S4", "V4")
VALUES = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0, 60.0], np.float32)
HEADERS = (
    b"PK\x03\x04",
    b"\x80\x04\x95",
    b"\x93NUMPY\x01\x00",
    b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    b"(9999999999999,)",
    b"|O",
    b">f4",
    b"(" * 200,
    b"-1",
    b"True",
    b"'descr'",
    b"[('a', '<f4')]",
    b"1.5",
    b"\x00",
    b"",
)
Choose = Callable[[int], int]


class Npy(bytes):
    """A payload in npy format, as it is sent."""


def message(choose: Choose) -> tuple[Reply, Expected]:
    """A reply with up to four mutations, and what the server expects of it."""
    number = choose(len(CODECS))
    header, payload = GOOD[number]
    fields: Any = json.loads(header)
    payload = payload.copy()
    for _ in range(1 + choose(4)):
        payload, fields = MUTATIONS[choose(len(MUTATIONS))](choose, payload, fields)
    if isinstance(payload, np.ndarray) and isinstance(fields, dict) and choose(2):
        fields["sha256"] = (
            digest(np.ascontiguousarray(payload)) if payload.dtype.kind in "fiu" else "0"
        )
    text = fields if isinstance(fields, str) else json.dumps(fields)
    if choose(8) == 0:
        at = choose(len(text) + 1)
        text = text[:at] + chr(choose(0x300)) * choose(3) + text[at + choose(3) :]
    expected = Expected("run", "alice", 3, 5, SIZE, TOKENS, LIMIT, CODECS[number])
    return Reply("alice", 3, text, payload), expected


def check(reply: Reply, expected: Expected) -> str:
    """Return the reason code, or `valid` if the update meets every requirement; else assert."""
    try:
        if isinstance(reply.payload, Npy):
            reply = replace(reply, payload=read_npy(reply.payload))
        update = decode(reply, expected)
    except UpdateRejected as rejection:
        assert rejection.code in REASONS
        assert len(rejection.detail) < 500, "a detail must fit a line of a log"
        return rejection.code
    assert (update.client, update.number, update.version) == ("alice", 3, 5)
    assert (
        update.delta.dtype == np.float32
        and update.delta.shape == (SIZE,)
        and np.isfinite(update.delta).all()
    )
    assert np.linalg.norm(update.delta.astype(np.float64)) <= LIMIT * (1 + 1e-4)
    assert type(update.tokens) is int and 0 < update.tokens <= TOKENS
    assert all(type(name) is str and np.isfinite(value) for name, value in update.metrics.items())
    return "valid"


def _numbers(payload: Any) -> bool:
    return isinstance(payload, np.ndarray) and payload.dtype.kind != "O"


def _bytes(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if _numbers(payload) and payload.nbytes and payload.flags.c_contiguous:
        raw = payload.reshape(-1).view(np.uint8)
        for _ in range(1 + choose(4)):
            raw[choose(raw.size)] = choose(256)
    return payload, fields


def _length(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if _numbers(payload):
        flat = payload.reshape(-1)
        payload = (flat[: choose(flat.size + 1)], np.concatenate([flat, flat[: choose(64)]]))[
            choose(2)
        ].copy()
    return payload, fields


def _dtype(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if _numbers(payload):
        dtype = np.dtype(DTYPES[choose(len(DTYPES))])
        raw = np.ascontiguousarray(payload).reshape(-1).view(np.uint8)
        payload = raw[: raw.size // dtype.itemsize * dtype.itemsize].copy().view(dtype)
    return payload, fields


def _shape(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if _numbers(payload):
        shapes = (
            payload[None],
            payload.reshape(-1, 1),
            payload.reshape(-1)[::2],
            np.stack([payload, payload]),
        )
        payload = shapes[choose(len(shapes))]
    return payload, fields


def _values(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if isinstance(payload, np.ndarray) and payload.dtype == np.float32 and payload.size:
        payload = payload.copy()
        payload.reshape(-1)[choose(payload.size) :: 1 + choose(payload.size)] = VALUES[
            choose(len(VALUES))
        ]
    return payload, fields


def _type(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    others = (
        None,
        b"\x80\x04",
        "text",
        [1.0, 2.0],
        np.array([object()] * 3),
        np.float32(1),
        memoryview(b"abc"),
    )
    return others[choose(len(others))], fields


def _field(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if isinstance(fields, dict) and fields:
        fields = {**fields, list(fields)[choose(len(fields))]: JUNK[choose(len(JUNK))]}
    return payload, fields


def _missing(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    if isinstance(fields, dict) and fields:
        fields = {k: v for i, (k, v) in enumerate(fields.items()) if i != choose(len(fields))}
    return payload, fields


def _npy(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    """As `.npy`, and changed there: most of all in the first 128 bytes, which are its header."""
    if not _numbers(payload):
        return payload, fields
    buffer = io.BytesIO()
    np.save(buffer, payload)
    data = bytearray(buffer.getvalue())
    for _ in range(choose(4)):
        at = choose(min(len(data), (128, len(data))[choose(2)]) + 1)
        part = HEADERS[choose(len(HEADERS))]
        data[at : at + choose(len(part) + 2)] = part
    if choose(4) == 0:
        data = data[: choose(len(data) + 1)]
    return Npy(data), fields


def _header(choose: Choose, payload: Any, fields: Any) -> tuple[Any, Any]:
    bombs = (
        "[" * 100_000,
        "9" * 10_000,
        "{" * 50,
        "",
        "null",
        "1e999",
        '{"format": ' + "9" * 5000 + "}",
        "\ud800",
    )
    return payload, bombs[choose(len(bombs))]


MUTATIONS = (
    _bytes,
    _bytes,
    _length,
    _dtype,
    _shape,
    _values,
    _values,
    _type,
    _field,
    _field,
    _field,
    _missing,
    _header,
    _npy,
    _npy,
)
