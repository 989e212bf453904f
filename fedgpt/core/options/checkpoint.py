"""Options of the group `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_least, option


@dataclass
class CheckpointOptions(Group):
    """What is saved during a run, so that it can be resumed after a stop."""

    group = "checkpoint"

    every: int | None = option(
        None,
        "Number of server versions from one checkpoint to the next. null means one checkpoint for"
        " each round (pace=buffer: for as many updates as a round would have); 0 means only the"
        " last version.",
        unit="versions",
        allowed=at_least(0, zero="only the last"),
    )
    keep: int = option(
        2, "Number of checkpoints that are kept, the newest ones.", allowed=at_least(1)
    )
    best: bool = option(True, "Whether the weights with the best held-out score are kept, too.")
    journal: bool | None = option(
        None,
        "Whether updates are saved as they arrive until the next checkpoint, so that after a stop"
        " no finished job is lost. null means where that saves work.",
    )
