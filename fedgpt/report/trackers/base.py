"""The interface of trackers, which write a run's metrics to a file or send them to a service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgpt.core.events import Event

WRITTEN = ("prompt", "sample")  # fields with a text that the model wrote


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker is opened for."""

    name: str
    folder: Path
    options: Mapping[str, Any]  # dotted name of each option -> its value, of plain types
    resumed_at: int = 0  # the version that the run continues from; 0: the run begins


class Tracker(ABC):
    """An observer that keeps a run's metrics; its fields are its options.

    A tracker gets every event of core/events.py and ignores those that it has no use for; in place
    of RunClosed, `close` is called. It gets each version's MetricsReady once and in order, also
    when the run is killed and resumed: after `open`, the lines of metrics.jsonl that the tracker
    lacks come first, as MetricsReady events. Other events of a process that was killed are not
    repeated.

    `open`, the events and `close` all come on ONE thread, which only delivers events: a slow
    tracker does not slow training down, but other trackers and the progress display wait for it.
    `open` is called just before the first event, `close` once after the last one, also after an
    interrupt or an error; neither is called where a run stops before its first event. At its end a
    run waits half a minute at most: what a slow tracker has not taken by then is lost, and one that
    hangs is not closed. When a method raises, one warning is logged, the tracker is closed, and the
    run continues without it. With privacy=client a tracker gets only RunOpened and MetricsReady,
    with the fields that may be published (report/published.py).

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
        """Begin, or continue where `run.resumed_at` is above 0; return the newest version kept.

        A resumed run makes its versions from `resumed_at` on again: a tracker that can should drop
        those that it has. Return -1 where no version is kept. This default says that all versions
        before `resumed_at` are kept.
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
    """Return a line of metrics as one plain value for each name, as tables and charts need it.

    `rejected` becomes the number of rejected replies, `staleness` the mean over accepted updates.
    Tables by client and texts that the model wrote are left out.

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
