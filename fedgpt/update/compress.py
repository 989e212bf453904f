"""The codec of a run, and the problems of its options.

    client   u = feed(delta, residual, decay)
             payload = encode(u)
             residual = rest(u, decode(payload))
    server   q = decode(payload), then the validation that every delta passes

Client and server build the codec from the same options (codecs/base.py). feed and rest are error
feedback (feedback.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgpt.core.members import Members
from fedgpt.core.options import UpdateOptions
from fedgpt.update.codecs.base import Codec

CODECS = Members("update", "update.compress", Codec)


def codec_of(options: UpdateOptions, trusted: Sequence[str] = ()) -> Codec:
    """Return the codec of a run; `trusted` are the packages that `_target_` may name.

    Raises ConfigError, also for an option that the chosen codec does not have.

    >>> codec_of(UpdateOptions(compress="int4")).payload_bytes(1024)
    528
    >>> codec_of(UpdateOptions(compress="topk", density=1 / 128))
    TopK(density=0.0078125)
    """
    return CODECS.build(options, trusted)


def make_codec(name: str, **options: Any) -> Codec:
    """Return the codec `update.compress=name` with its options; raises ConfigError.

    >>> make_codec("int8", block=256)
    Int8(block=256)
    """
    return codec_of(UpdateOptions(compress=name, **options))
