"""Options of the group `checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_least, option


@dataclass
class CheckpointOptions(Group):
    """Files from which a stopped run can be resumed."""

    group = "checkpoint"

    every: int | None = option(
        None,
        "Number of versions between two checkpoints. null means one checkpoint for each round"
        " (with pace=buffer, after pace.clients updates). 0 means only the last version.",
        unit="versions",
        allowed=at_least(0, zero="only the last"),
    )
    keep: int = option(
        2, "Number of newest checkpoints that are kept.", allowed=at_least(1, end=10**6)
    )
    best: bool = option(True, "Whether the weights with the best held-out score are also kept.")
    journal: bool | None = option(
        None,
        "Whether the server keeps a journal of replies since the last checkpoint, so that a"
        " restart repeats no accepted job. null means a journal for asynchronous runs on the real"
        " clock and for runs with real clients.",
    )
