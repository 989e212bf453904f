"""The interface of a codec, which compresses a client's delta and decompresses it at the server.

    client   delta (n,) float32  -> encode -> payload (bytes,) uint8   -> network
    server   payload, n          -> decode -> delta' (n,) float32      -> validation, aggregation

The server knows the codec, its options and n, the number of parameters. These determine the exact
length of a payload, so a payload has no header, and no client data determines how much memory is
allocated. A client may be hostile, so `decode` checks every byte that it relies on.

Every codec has these properties, which tests/update checks: the same delta gives the same bytes,
zeros stay zeros, `decode` rejects the payload of a delta with NaN or infinity, and compression is
idempotent (compressing a decoded delta does not change it).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from fedgpt.core.errors import UpdateRejected

CHUNK = 1 << 17  # elements processed at a time; with their scratch space they fit a core's cache
MAX = np.finfo(np.float32).max
LARGEST = 0x7F7FFFFF  # the bits of MAX; magnitudes above are infinities and NaN


class Codec(ABC):
    """One way to compress a delta: a frozen dataclass with its options, equal on both sides.

    A codec outside of fedgpt is a file like this one, mine.py, whose codec sends only signs:

    >>> from dataclasses import dataclass
    >>> import numpy as np
    >>> from fedgpt.core.errors import UpdateRejected
    >>> from fedgpt.update.codecs.base import Codec, received
    >>> @dataclass(frozen=True)
    ... class Sign(Codec):
    ...     step: float = 0.01  # an element is decoded to +step, -step or 0
    ...
    ...     def payload_bytes(self, size):
    ...         return size
    ...
    ...     def encode(self, delta):
    ...         codes = (delta > 0).astype(np.int8) - (delta < 0)
    ...         codes[~np.isfinite(delta)] = 2  # which `decode` refuses
    ...         return codes.view(np.uint8)
    ...
    ...     def decode(self, payload, size):
    ...         codes = received(payload, self.payload_bytes(size)).view(np.int8)
    ...         if (codes == 2).any():
    ...             raise UpdateRejected("non_finite")
    ...         if (abs(codes) > 1).any():
    ...             raise UpdateRejected("bad_encoding", "a code that is not -1, 0 or 1")
    ...         return codes * np.float32(self.step)

    Its client half and its server half:

    >>> codec = Sign(step=0.5)
    >>> payload = codec.encode(np.array([0.3, -2.0, 0.0], np.float32))
    >>> payload
    array([  1, 255,   0], dtype=uint8)
    >>> codec.decode(payload, 3)
    array([ 0.5, -0.5,  0. ], dtype=float32)

    With mine.py on the PYTHONPATH a run uses it by:

        fedgpt run update=custom update._target_=mine.Sign 'update.arguments={step: 0.02}' \\
            update.error_feedback=true 'trusted_packages=[mine]'

    A codec checks its options in `__post_init__` and raises ConfigError for a value out of range.
    """

    @property
    def name(self) -> str:
        """The name in messages and in an update's header: int8, or mine.Sign."""
        cls = type(self)
        package, _, module = cls.__module__.rpartition(".")
        return module if package == __package__ else f"{cls.__module__}.{cls.__name__}"

    @abstractmethod
    def payload_bytes(self, size: int) -> int:
        """Return the exact number of bytes in the payload of `size` elements."""

    @abstractmethod
    def encode(self, delta: np.ndarray) -> np.ndarray:
        """Return the payload, (payload_bytes(n),) uint8, of a delta (n,) float32.

        Values that are not finite raise no error here; `decode` rejects the payload.
        """

    @abstractmethod
    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """Return a new (size,) float32 of finite values; raises UpdateRejected and nothing else.

        `payload` comes from the network and may be anything: start with `received`.
        """


def received(payload: object, count: int) -> np.ndarray:
    """Return a payload as (count,) uint8; raises UpdateRejected unless it is exactly that."""
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
    """Raise UpdateRejected if (n,) float32 contains a NaN or an infinity."""
    bits = values.view(np.uint32)
    for start in range(0, values.size, CHUNK):
        if (bits[start : start + CHUNK] & 0x7FFFFFFF).max() > LARGEST:
            raise UpdateRejected("non_finite")
