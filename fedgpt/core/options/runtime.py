"""Options of the group `runtime`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, arguments, at_least, member, one_of, option, target


@dataclass
class RuntimeOptions(Group):
    """What runs the clients and carries the messages between them and the server."""

    group = "runtime"

    name: str = member("pool")
    workers: int = option(
        0,
        "Number of processes that run clients. 0 means one for each CPU core, or one for each GPU.",
        unit="processes",
        allowed=at_least(0, zero="choose"),
    )
    threads: int = option(
        0,
        "PyTorch threads of each of these processes. 0 means the cores divided by the processes.",
        unit="threads",
        allowed=at_least(0, zero="choose"),
    )
    device: str = option(
        "auto",
        "Where clients train. auto: on a GPU where there is one.",
        allowed=one_of("auto", "cpu", "cuda"),
    )
    watchdog: float = option(
        3600.0,
        "Longest time of a job without progress. After it the process of the client is ended and"
        " the job has failed.",
        unit="seconds",
        allowed=at_least(0, "seconds", zero="off"),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()
