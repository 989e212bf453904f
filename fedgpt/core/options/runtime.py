"""Options of the group `runtime`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import (
    LONGEST,
    Group,
    arguments,
    at_least,
    member,
    one_of,
    option,
    target,
)


@dataclass
class RuntimeOptions(Group):
    """The part that runs the clients and transports messages between them and the server."""

    group = "runtime"

    name: str = member("pool")
    workers: int = option(
        0,
        "Number of processes that run clients. 0 means one for each CPU core, or one for each GPU.",
        unit="processes",
        allowed=at_least(0, end=4096, zero="choose"),
    )
    threads: int = option(
        0,
        "Number of PyTorch threads of each client process. 0 means the number of cores divided by"
        " the number of processes.",
        unit="threads",
        allowed=at_least(0, end=4096, zero="choose"),
    )
    device: str = option(
        "auto",
        "Device on which clients train. auto: a GPU if one is available.",
        allowed=one_of("auto", "cpu", "cuda"),
    )
    watchdog: float = option(
        3600.0,
        "Time limit of a job. At the limit the client's process is ended, and the job has failed.",
        unit="seconds",
        allowed=at_least(0, "seconds", end=LONGEST, zero="off"),
    )
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Two runtimes have a fixed number of processes; from `workers` follow their threads."""
        if self.name in ("inprocess", "superlink") and self.threads:
            yield "workers", f"runtime={self.name}; choose runtime=pool or runtime=ray"
