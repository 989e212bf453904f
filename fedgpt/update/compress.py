"""The `compress` stage of an update's way: a client half and a server half over one flat float32
delta.

    client   u = feed(delta, residual, beta) ; payload = encode(u) ; residual = rest(u, decode(payload, n))
    server   q = decode(payload, n), then validation as of any delta

The server knows the number of elements, the codec and its options, and from them the exact length
of a payload: there is no header, nothing that a client sends sizes a buffer, and every position is
checked before it is used. A payload either decodes to n finite values or raises UpdateRejected.
What is not finite in a delta is refused by the server.

What every codec promises (tests/update/test_compress.py): the same delta gives the same bytes,
zeros stay zeros, and quantising a second time changes nothing, so that a delta that was decoded can
be sent on as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol

import numpy as np

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import UpdateOptions
from fedgpt.update.blockwise import BF16, E3M0, Int4, Int8, received, refuse_non_finite
from fedgpt.update.sparse import SparseLoCo, TopK


class Compressor(Protocol):
    """One codec with its options: a frozen dataclass, equal on both sides."""

    name: ClassVar[str]

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (most_bytes(n),) uint8, without an error for values that are not
        finite.
        """
        ...

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(most_bytes(n),) uint8 -> a new (n,) float32, finite, or UpdateRejected and nothing
        else.
        """
        ...

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements: exact in all codecs here."""
        ...


@dataclass(frozen=True)
class Plain:
    """No compression: the float32 bytes as they are."""

    name: ClassVar[str] = "none"

    def most_bytes(self, size: int) -> int:
        """Bytes of a payload of `size` elements, exactly."""
        return 4 * size

    def encode(self, delta: np.ndarray) -> np.ndarray:
        """(n,) float32 -> (4 n,) uint8."""
        return delta.astype("<f4").view(np.uint8)

    def decode(self, payload: np.ndarray, size: int) -> np.ndarray:
        """(4 n,) uint8 -> (n,) float32, or UpdateRejected."""
        values = received(payload, self.most_bytes(size)).view("<f4").astype(np.float32)
        refuse_non_finite(values)
        return values


COMPRESSORS: dict[str, type[Compressor]] = {
    codec.name: codec for codec in (Plain, BF16, Int8, Int4, E3M0, TopK, SparseLoCo)
}


def compressor_of(options: UpdateOptions) -> Compressor:
    """The codec of a run, or ConfigError."""
    chosen = {name: getattr(options, name) for name in ("block", "density")}
    return make_compressor(
        options.compress, **{name: value for name, value in chosen.items() if value is not None}
    )


def update_problems(options: UpdateOptions) -> Iterator[str]:
    """What is wrong with the options of the chosen codec."""
    try:
        compressor_of(options)
    except ConfigError as error:
        yield from error.problems


def make_compressor(name: str, **options: object) -> Compressor:
    """The codec `update.compress=name` with its options, or ConfigError.

    >>> make_compressor("int4").most_bytes(1024), make_compressor("topk", density=1 / 128)
    (528, TopK(density=0.0078125))
    """
    codec = COMPRESSORS.get(name)
    if codec is None:
        raise ConfigError(
            f"update.compress={name}: expected one of"
            f" {', '.join(COMPRESSORS)}{nearest(name, COMPRESSORS)}"
        )
    known = [field.name for field in fields(codec)]  # pyright: ignore[reportArgumentType]  # all are dataclasses
    unknown = sorted(options.keys() - set(known))
    if unknown:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise ConfigError(
            [
                f"update.{key}={options[key]}: no option of update.compress={name}; {has}"
                for key in unknown
            ]
        )
    return codec(**options)
