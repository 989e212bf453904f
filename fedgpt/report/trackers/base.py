"""The interface of trackers, which write a run's metrics to a file or send them to a service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgpt.core.events import Event

WRITTEN = ("prompt", "sample")  # fields with generated text


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for."""

    name: str
    folder: Path
    options: Mapping[str, Any]  # dotted name of each option -> its value, of plain types
    resumed_at: int = 0  # the version from which the run continues; 0: a new run


class Tracker(ABC):
    """An observer that stores a run's metrics; its fields are its options.

    A tracker gets every event of core/events.py and may ignore events; `close` is called in place
    of RunClosed. It gets each version's MetricsReady once and in order, also when the run is killed
    and resumed: after `open`, the lines of metrics.jsonl that the tracker lacks come first, as
    MetricsReady events. Other events of a process that was killed are not repeated.

    The delivery thread calls `open`, delivers the events and calls `close`. A slow tracker does not
    delay training, but other trackers and the progress display wait for it. `open` is called before
    the first event, and `close` once after the last event, also after an interrupt or an error. If
    a run stops before its first event, neither is called. The end of a run waits at most 30 seconds
    for its trackers; events that are not delivered by then are lost. If a method raises, one
    warning is logged, the tracker is closed, and the run continues without it. With privacy=client
    a tracker gets only RunOpened and MetricsReady, with the fields that may be published
    (report/published.py).

    A run that is resumed at version 2, with a tracker that has kept version 0 only:

    >>> from fedgpt.core.events import MetricsReady
    >>> class Printer(Tracker):
    ...     def open(self, run):
    ...         print(f"{run.name} from version {run.resumed_at} on")
    ...         return 0
    ...     def __call__(self, event):
    ...         if isinstance(event, MetricsReady):
    ...             print(flat(event.metrics))
    >>> printer = Printer()
    >>> kept = printer.open(TrackedRun("demo", Path("runs/demo"), {"seed": 0}, resumed_at=2))
    demo from version 2 on
    >>> for version in range(kept + 1, 4):
    ...     printer(MetricsReady({"version": version, "loss": 8 / (version + 1)}))
    {'version': 1, 'loss': 4.0}
    {'version': 2, 'loss': 2.6666666666666665}
    {'version': 3, 'loss': 2.0}
    >>> printer.close()
    """

    def open(self, run: TrackedRun) -> int:
        """Begin, or continue if `run.resumed_at` is above 0; return the newest version stored.

        A resumed run repeats its versions from `resumed_at` onwards, so a tracker should delete
        those that it has, if it can. Return -1 if no version is stored. The default return value
        means that all versions before `resumed_at` are stored.
        """
        return run.resumed_at - 1

    @abstractmethod
    def __call__(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:  # noqa: B027, as many trackers have nothing to close
        """Write what is still in memory and release files and connections; called once, unless
        `open` was never called.
        """


def flat(metrics: Mapping[str, Any]) -> dict[str, float | int | str | None]:
    """Return a line of metrics with one plain value per name, for tables and charts.

    `rejected` becomes the number of rejected replies, `staleness` the mean over accepted updates.
    Tables by client and generated texts are removed.

    >>> flat({"version": 3, "rejected": {"late": 2}, "staleness": {"0": 3, "2": 1}, "sample": "We"})
    {'version': 3, 'rejected': 2, 'staleness': 0.5}
    """
    row: dict[str, float | int | str | None] = {}
    for name, value in metrics.items():
        if name == "rejected":
            row[name] = sum(value.values())
        elif name == "staleness":
            updates = sum(value.values())
            total = sum(int(versions) * count for versions, count in value.items())
            row[name] = total / updates if updates else None
        elif name not in WRITTEN and (value is None or isinstance(value, int | float | str)):
            row[name] = value
    return row
