"""The message of an update: one array, compressed or not, and a JSON header with its digest.

    client   Update -> encode -> header (JSON text) + array        -> network
    server   Reply  -> decode -> Update, or UpdateRejected(reason) -> aggregation

Every update passes through `decode` before aggregation. It returns a valid Update or raises
UpdateRejected with a reason code. No client data determines how much memory is allocated or which
part of an array is read. The cheapest checks run first.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Reply, Update
from fedgpt.update.codecs.base import Codec
from fedgpt.update.codecs.none import Plain

FORMAT = 2
PLAIN = Plain()
MOST_HEADER = 1 << 16  # largest header in characters; a correct header has a few hundred
MOST_METRIC = 1e30  # largest metric, so that sums over many clients are finite
REASONS = (
    "client_error",
    "no_reply",
    "offline",
    "policy",
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
    """The properties of the expected reply, against which every reply is checked."""

    run: str
    client: str
    number: int
    version: int
    size: int  # number of parameters
    tokens: int  # tokens of the job, the largest valid number of tokens
    norm_limit: float  # largest norm of an accepted delta, fixed at the start of the version
    codec: Codec = PLAIN


def encode(run: str, update: Update, codec: Codec = PLAIN) -> tuple[str, np.ndarray]:
    """Return (header, array) of an update; the array is its delta, or the payload of a codec."""
    payload = compress(update.delta, codec)
    return header_of(run, update, payload, codec), payload


def compress(delta: np.ndarray, codec: Codec) -> np.ndarray:
    """Return the array that is sent for a (parameters,) float32 delta."""
    return delta if isinstance(codec, Plain) else codec.encode(delta)


def header_of(run: str, update: Update, payload: np.ndarray, codec: Codec) -> str:
    """Return the header that belongs to a payload."""
    # "task" is the number of the job: jobs were called tasks when the format was made. The name
    # stays, here, in the message of a job (flower/messages.py) and in the file names of a client's
    # state (client/state.py), because running clients and saved state know it. It has nothing to
    # do with a run's task (fedgpt/tasks).
    header = {
        "format": FORMAT,
        "run": run,
        "client": update.client,
        "task": update.number,
        "version": update.version,
        "size": int(update.delta.size),
        "compress": codec.name,
        "sha256": digest(payload),
        "tokens": update.tokens,
        "metrics": update.metrics,
    }
    return json.dumps(header)


def digest(array: np.ndarray) -> str:
    """Return the hexadecimal sha256 of the array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


def decode(reply: Reply, expected: Expected) -> Update:
    """Return the update in `reply`; raises UpdateRejected(code, detail) and nothing else."""
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
    _same(header, "compress", expected.codec.name, "bad_encoding")
    array = _array(reply.payload, header, expected)
    tokens = header.get("tokens")
    if type(tokens) is not int or not 0 < tokens <= expected.tokens:
        raise UpdateRejected("bad_num_tokens", f"{tokens!r:.40}, expected 1 to {expected.tokens}")
    metrics = _metrics(header.get("metrics"))
    metrics["update_norm"] = _checked_norm(array, expected.norm_limit)
    return Update(expected.client, expected.number, expected.version, array, tokens, metrics)


def _array(payload: object, header: dict[str, object], expected: Expected) -> np.ndarray:
    """Return the delta, (size,) float32, of a payload of the expected type, shape and digest."""
    codec, size = expected.codec, expected.size
    plain = isinstance(codec, Plain)
    dtype = np.dtype("<f4") if plain else np.dtype(np.uint8)
    shape = (size if plain else codec.payload_bytes(size),)
    if not isinstance(payload, np.ndarray):
        raise UpdateRejected("bad_encoding", f"payload is {type(payload).__name__}, not an array")
    if payload.dtype != dtype:
        raise UpdateRejected("wrong_dtype", f"{payload.dtype.str}, expected {dtype.str}")
    if payload.shape != shape:
        raise UpdateRejected("wrong_shape", f"{payload.shape}, expected {shape}")
    if digest(payload) != header.get("sha256"):
        raise UpdateRejected("digest_mismatch")
    if plain:
        return payload
    delta = codec.decode(payload, size)
    if not isinstance(delta, np.ndarray) or (delta.dtype, delta.shape) != (np.float32, (size,)):
        raise UpdateRejected("bad_encoding", f"{codec.name} did not decode to {size} float32")
    return delta


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
    """Return the L2 norm; raises UpdateRejected if it is above the limit or not finite.

    A finite float32 norm proves that every element is finite, at a tenth of isfinite's cost.
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
