"""Trackers: where metrics go beside the run's own files.

    track=[csv]                             built in: the class in fedgpt/report/trackers/csv.py
    track=[csv,{_target_:mine.Chart}]       any class, where trusted_packages=[mine] allows it

A new tracker is one file in this folder, with one class that inherits from Tracker (base.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from fedgpt.core.errors import ConfigError
from fedgpt.core.events import Event, MetricsReady
from fedgpt.core.options import RunOptions
from fedgpt.core.options.option import dotted
from fedgpt.core.score import LANGUAGE
from fedgpt.core.targets import Members
from fedgpt.report.published import published_event
from fedgpt.report.trackers.base import TrackedRun, Tracker
from fedgpt.storage.run_folder import read_lines

MEMBERS = Members("track", "track", Tracker)
log = logging.getLogger(__name__)


def make_trackers(
    options: RunOptions, folder: Path, resumed_at: int, scores: Iterable[str] = LANGUAGE.names
) -> list[Tracker]:
    """Make the trackers that `options.track` names; files are touched from the first event on.

    `resumed_at` is the version that the run continues from, 0 for a new one. `scores` names all
    scores of the task: with privacy=client, trackers get no other score. Call the trackers like
    other observers, and `close` each of them after the last event; neither ever raises. Raises
    ConfigError with every problem that was found.
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


class _Guarded(Tracker):
    """A tracker that lacks no version, gets no secret, and whose failure costs the run nothing."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, scores: Iterable[str] | None):
        """`scores` may be shown of a run with privacy=client; None: everything may be shown."""
        self.name, self.tracker, self.run, self.scores = name, tracker, run, scores
        self._newest: int | None = None  # newest version that the tracker has; None: not opened yet
        self._failed = False

    def __call__(self, event: Event) -> None:
        if self._failed:
            return
        try:
            if self._newest is None:
                self._newest = self.tracker.open(self.run)
                for line in read_lines(self.run.folder / "metrics.jsonl"):
                    if line["version"] < self.run.resumed_at:
                        self._deliver(MetricsReady(line))
            self._deliver(event)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        if self._failed or self._newest is None:
            return
        try:
            self.tracker.close()
        except Exception as error:
            self._fail(error)

    def _deliver(self, event: Event) -> None:
        """Hand an event on: nothing that is secret, and no version twice."""
        shown = event if self.scores is None else published_event(event, self.scores)
        if shown is None:
            return
        if isinstance(shown, MetricsReady):
            version = shown.metrics["version"]
            if self._newest is not None and version <= self._newest:
                return
            self._newest = version
        self.tracker(shown)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        log.warning(
            "track=%s: stopped after an error (%s: %s); the run continues without it, and"
            " metrics.jsonl has every version",
            self.name,
            type(error).__name__,
            error,
        )
        try:
            self.tracker.close()
        except Exception:
            log.debug("track=%s: could not be closed", self.name, exc_info=True)
