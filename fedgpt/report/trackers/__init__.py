"""Trackers, which write metrics to additional files or services.

    track=[csv]                             built in: the class in fedgpt/report/trackers/csv.py
    track=[csv,{_target_:mine.Chart}]       any class, where trusted_packages=[mine] allows it

A new tracker is one file in this folder, with one class that inherits from Tracker (base.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from fedgpt.core.errors import ConfigError
from fedgpt.core.events import Event, MetricsReady, Observer, RunClosed
from fedgpt.core.members import Members
from fedgpt.core.options import RunOptions
from fedgpt.core.options.option import dotted
from fedgpt.core.score import LANGUAGE
from fedgpt.report.published import published_event
from fedgpt.report.trackers.base import TrackedRun, Tracker
from fedgpt.storage.run_folder import read_lines

MEMBERS = Members("track", "track", Tracker)


def make_trackers(
    options: RunOptions, folder: Path, resumed_at: int, scores: Iterable[str] = LANGUAGE.names
) -> list[Observer]:
    """Make the trackers that `options.track` names; no file is opened before the first event.

    `resumed_at` is the version from which the run continues, 0 for a new run. `scores` names all
    scores of the task: with privacy=client, trackers get no other score. The trackers are observers
    like others: RunClosed closes them. Raises ConfigError with every problem that was found.
    """
    run = TrackedRun(options.name, folder, dotted(asdict(options)), resumed_at)
    shown = tuple(scores) if options.privacy.unit == "client" else None
    built = MEMBERS.build_list(options.track, options.trusted_packages)
    return [_Guarded(name, tracker, run, shown) for name, tracker in built]


def tracker_problems(options: RunOptions) -> list[str]:
    """Return why `make_trackers` would raise ConfigError; empty where it would not."""
    try:
        MEMBERS.build_list(options.track, options.trusted_packages)
    except ConfigError as error:
        return error.problems
    return []


class _Guarded:
    """A tracker as an observer: the first event opens it, and RunClosed closes it.

    It gets all versions and no secrets. Exceptions are handled by server/observers.py.
    """

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, scores: Iterable[str] | None):
        """`scores`: the scores that may be published with privacy=client; None: all fields may be
        published.
        """
        self.name, self.tracker, self.run, self.scores = name, tracker, run, scores
        self._opened = False  # whether `open` was called
        self._newest = -1  # newest version that the tracker has

    def __str__(self) -> str:
        return f"track={self.name}"

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunClosed):
            if self._opened:
                self.tracker.close()
            return
        if not self._opened:
            self._open()
        self._deliver(event)

    def _open(self) -> None:
        self._opened = True
        self._newest = self.tracker.open(self.run)
        for line in read_lines(self.run.folder / "metrics.jsonl"):
            if line["version"] < self.run.resumed_at:
                self._deliver(MetricsReady(line))

    def _deliver(self, event: Event) -> None:
        """Deliver an event, without secrets and without repeating a version."""
        shown = event if self.scores is None else published_event(event, self.scores)
        if shown is None:
            return
        if isinstance(shown, MetricsReady):
            version = shown.metrics["version"]
            if version <= self._newest:
                return
            self._newest = version
        self.tracker(shown)
