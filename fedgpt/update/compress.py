"""The compress stage: which codec a run uses, and what is wrong with `update.*`.

    client   u = feed(delta, residual, decay)
             payload = encode(u)
             residual = rest(u, decode(payload))
    server   q = decode(payload), then the validation that every delta passes

Both sides build the codec from the same options (codecs/base.py says what a codec is). feed and
rest are error feedback (feedback.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import UpdateOptions
from fedgpt.core.targets import CUSTOM, Members, field_names
from fedgpt.update.codecs.base import Codec

CODECS = Members("update", "update.compress", Codec)
OPTIONS = ("block", "density")  # options that only some codecs have; null: the codec's default
DOWNLINKS = ("fp32", "bf16", "int8", "int4")  # values of update.downlink


def codec_of(options: UpdateOptions, trusted: Sequence[str] = ()) -> Codec:
    """Return the codec of a run; `trusted` are the packages that `_target_` may name.

    Raises ConfigError, also for an option that the chosen codec does not have.

    >>> codec_of(UpdateOptions(compress="int4")).payload_bytes(1024)
    528
    >>> codec_of(UpdateOptions(compress="topk", density=1 / 128))
    TopK(density=0.0078125)
    """
    codec = CODECS.build(options, trusted)
    if problems := list(_foreign_options(options)):
        raise ConfigError(problems)
    return codec


def make_codec(name: str, **options: Any) -> Codec:
    """Return the codec `update.compress=name` with its options; raises ConfigError.

    >>> make_codec("int8", block=256)
    Int8(block=256)
    """
    return codec_of(UpdateOptions(compress=name, **options))


def update_problems(options: UpdateOptions, trusted: Sequence[str] = ()) -> Iterator[str]:
    """Yield what is wrong with `update.*`."""
    try:
        CODECS.build(options, trusted)
    except ConfigError as error:
        yield from error.problems
    yield from _foreign_options(options)
    if options.compress == "none" and options.error_feedback:
        yield (
            "update.error_feedback=true: update.compress=none leaves nothing out; choose a codec,"
            " or leave update.error_feedback out"
        )
    if not 0 < options.decay <= 1:
        yield (
            f"update.decay={options.decay}: must be above 0 and at most 1 (1 = nothing is ever"
            " lost)"
        )
    if options.downlink not in DOWNLINKS:
        yield f"update.downlink={options.downlink}: must be fp32, bf16, int8 or int4"


def _foreign_options(options: UpdateOptions) -> Iterator[str]:
    """Yield a problem for each option that is set and that the chosen codec does not have."""
    name, known, has = options.compress, [], ""
    if name == CUSTOM:
        has = "give the options of a class of your own in update.arguments"
    elif name in CODECS.names():
        known = field_names(CODECS.load(name))
        has = f"it has {', '.join(known)}" if known else "it has none"
    else:
        return  # the name itself is the problem
    for option in OPTIONS:
        value = getattr(options, option)
        if value is not None and option not in known:
            yield f"update.{option}={value}: no option of update.compress={name}; {has}"
