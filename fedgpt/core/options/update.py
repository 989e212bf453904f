"""Options of the group `update`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, above, arguments, member, one_of, option, target


@dataclass
class UpdateOptions(Group):
    """Compression of updates sent to the server, and of the model sent to clients."""

    group = "update"
    choice_field = "compress"

    compress: str = member("none")
    block: int | None = option(
        None,
        "int8, int4, e3m0: number of consecutive parameters that share one scale. null means the"
        " codec's default.",
        unit="parameters",
        only_with=("int8", "int4", "e3m0", "custom"),
    )
    density: float | None = option(
        None,
        "topk: share of the parameters that is sent, the largest elements of the update. null"
        " means the codec's default.",
        only_with=("topk", "custom"),
    )
    error_feedback: bool = option(
        False,
        "Whether a client adds the compression error (residual) of an update to its next update.",
    )
    decay: float = option(
        0.95,
        "Factor on the residual each time it is added to the next update.",
        allowed=above(0, most=1),
    )
    downlink: str = option(
        "fp32",
        "Format of the model sent to clients. fp32 and bf16: all parameters in this format. int8"
        " and int4: the difference to the version that the client has cached, compressed.",
        allowed=one_of("fp32", "bf16", "int8", "int4"),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()

    def rules(self) -> Iterator[str]:
        """Error feedback needs a codec with a compression error."""
        if self.compress == "none" and self.error_feedback:
            yield (
                "update.error_feedback=true: update.compress=none leaves nothing out; choose a"
                " codec, such as update=int8, or leave update.error_feedback out"
            )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Without error feedback no residual decays."""
        if not self.error_feedback:
            remedy = "add update.error_feedback=true and a codec, such as update=int8"
            yield "decay", f"update.error_feedback=false; {remedy}"
