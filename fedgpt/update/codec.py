"""An update on the wire: one array, compressed or not, and a JSON header with its digest.

`decode` is the only door into aggregation: it returns a valid Update or raises UpdateRejected with
a reason code. Nothing that a client sends sizes a buffer or slices an array here; the checks run
cheapest first.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Reply, Update
from fedgpt.update.compress import Compressor, Plain

FORMAT = 2
PLAIN = Plain()
MOST_HEADER = 1 << 16  # characters; ours has some hundred
MOST_METRIC = 1e30  # sums over many clients stay finite
REASONS = (
    "client_error",
    "no_reply",
    "too_large",
    "unknown_job",
    "duplicate",
    "late",
    "stale",
    "wrong_sender",
    "wrong_run",
    "missing_key",
    "extra_key",
    "pickle_refused",
    "bad_encoding",
    "size_mismatch",
    "wrong_dtype",
    "wrong_shape",
    "digest_mismatch",
    "non_finite",
    "norm_limit",
    "bad_num_tokens",
    "bad_metric",
)


@dataclass(frozen=True)
class Expected:
    """What the server knows of the reply it waits for; every check compares with this, never with
    the client's word.
    """

    run: str
    client: str
    number: int
    version: int
    size: int  # parameters
    tokens: int  # tokens of the job: more cannot have been trained
    norm_limit: float  # of the delta, frozen at the start of the version
    compressor: Compressor = PLAIN


def encode(run: str, update: Update, compressor: Compressor = PLAIN) -> tuple[str, np.ndarray]:
    """(header, array) of an update: its float32 delta as it is, or the uint8 payload of a codec."""
    payload = compress(update.delta, compressor)
    return header_of(run, update, payload, compressor), payload


def compress(delta: np.ndarray, compressor: Compressor) -> np.ndarray:
    """The array that travels for a (parameters,) float32 delta."""
    return delta if isinstance(compressor, Plain) else compressor.encode(delta)


def header_of(run: str, update: Update, payload: np.ndarray, compressor: Compressor) -> str:
    """The header that belongs to a payload."""
    header = {
        "format": FORMAT,
        "run": run,
        "client": update.client,
        "task": update.number,
        "version": update.version,
        "size": int(update.delta.size),
        "compress": compressor.name,
        "sha256": digest(payload),
        "tokens": update.tokens,
        "metrics": update.metrics,
    }
    return json.dumps(header)


def digest(array: np.ndarray) -> str:
    """sha256 over the array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def decode(reply: Reply, expected: Expected) -> Update:
    """The update in `reply`, or UpdateRejected(code, detail); no other exception leaves this
    function.
    """
    if reply.error:
        raise UpdateRejected(reply.code, reply.error)
    try:
        return _decode(reply, expected)
    except UpdateRejected:
        raise
    except Exception as error:  # a hostile payload may raise anything while numpy reads it
        raise UpdateRejected("bad_encoding", type(error).__name__) from error


def _decode(reply: Reply, expected: Expected) -> Update:
    if len(reply.header) > MOST_HEADER:
        raise UpdateRejected(
            "too_large", f"a header of {len(reply.header)} characters, at most {MOST_HEADER}"
        )
    header = json.loads(reply.header)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise UpdateRejected("bad_encoding", f"header format is not {FORMAT}")
    _same(header, "run", expected.run, "wrong_run")
    _same(header, "client", expected.client, "wrong_sender")
    _same(header, "task", expected.number, "unknown_job")
    _same(header, "version", expected.version, "late")
    _same(header, "size", expected.size, "size_mismatch")
    _same(header, "compress", expected.compressor.name, "bad_encoding")
    array = _array(reply.payload, header, expected)
    tokens = header.get("tokens")
    if type(tokens) is not int or not 0 < tokens <= expected.tokens:
        raise UpdateRejected("bad_num_tokens", f"{tokens!r:.40}, expected 1 to {expected.tokens}")
    metrics = _metrics(header.get("metrics"))
    metrics["update_norm"] = _checked_norm(array, expected.norm_limit)
    return Update(expected.client, expected.number, expected.version, array, tokens, metrics)


def _array(payload: object, header: dict[str, object], expected: Expected) -> np.ndarray:
    """(size,) float32 from a payload whose type, shape and digest are as announced."""
    plain = isinstance(expected.compressor, Plain)
    dtype = np.dtype("<f4") if plain else np.dtype(np.uint8)
    shape = (expected.size if plain else expected.compressor.most_bytes(expected.size),)
    if not isinstance(payload, np.ndarray):
        raise UpdateRejected("bad_encoding", f"payload is {type(payload).__name__}, not an array")
    if payload.dtype != dtype:
        raise UpdateRejected("wrong_dtype", f"{payload.dtype.str}, expected {dtype.str}")
    if payload.shape != shape:
        raise UpdateRejected("wrong_shape", f"{payload.shape}, expected {shape}")
    if digest(payload) != header.get("sha256"):
        raise UpdateRejected("digest_mismatch")
    return payload if plain else expected.compressor.decode(payload, expected.size)


def _same(header: dict[str, object], key: str, value: object, code: str) -> None:
    sent = header.get(key)
    if type(sent) is not type(value) or sent != value:
        raise UpdateRejected(code, f"{key} is {sent!r:.60}, expected {value!r}")


def _metrics(sent: object) -> dict[str, float]:
    if not isinstance(sent, dict):
        raise UpdateRejected("bad_metric", "no metrics")
    for name, value in sent.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= MOST_METRIC
        ):
            raise UpdateRejected("bad_metric", f"{name!r:.40} is {value!r:.40}")
    return {str(name): float(value) for name, value in sent.items()}


def _checked_norm(array: np.ndarray, limit: float) -> float:
    """L2 norm; a finite float32 norm proves that every element is finite, at a tenth of isfinite's
    cost.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(float(np.dot(array, array))) if array.size else 0.0
    if not math.isfinite(norm):
        if not np.isfinite(array).all():
            raise UpdateRejected("non_finite")
        norm = float(np.linalg.norm(array.astype(np.float64)))
    if norm > limit:
        raise UpdateRejected("norm_limit", f"norm {norm:.3g} above {limit:.3g}")
    return norm
