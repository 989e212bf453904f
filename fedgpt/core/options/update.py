"""Options of the group `update`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, above, arguments, member, one_of, option, target


@dataclass
class UpdateOptions(Group):
    """How updates are compressed on their way to the server, and the model on its way back."""

    group = "update"
    choice_field = "compress"

    compress: str = member("none")
    block: int | None = option(
        None,
        "int8, int4, e3m0: number of successive parameters that share one scale. null means the"
        " codec's own number.",
        unit="parameters",
        only_with=("int8", "int4", "e3m0", "custom"),
    )
    density: float | None = option(
        None,
        "topk: share of the parameters that is sent, those that changed most. null means the"
        " codec's own share.",
        only_with=("topk", "custom"),
    )
    error_feedback: bool = option(
        False,
        "Whether a client keeps what compression left out and adds it to its next update.",
    )
    decay: float = option(
        0.95,
        "Factor on what compression left out, each time it is carried over to the next update.",
        allowed=above(0, most=1),
    )
    downlink: str = option(
        "fp32",
        "How the model is sent to clients. fp32 and bf16: all parameters in this format. int8 and"
        " int4: only what has changed since the client received it last, compressed.",
        allowed=one_of("fp32", "bf16", "int8", "int4"),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()

    def rules(self) -> Iterator[str]:
        """Error feedback needs an error."""
        if self.compress == "none" and self.error_feedback:
            yield (
                "update.error_feedback=true: update.compress=none leaves nothing out; choose a"
                " codec, or leave update.error_feedback out"
            )
