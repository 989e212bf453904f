"""Trackers, which write metrics to additional files or services.

    track=[csv]                             built in: the class in fedgpt/report/trackers/csv.py
    track=[csv,{_target_:mine.Chart}]       any class, where trusted_packages=[mine] allows it

A new tracker is one file in this folder, with one class that inherits from Tracker (base.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.events import Event, MetricsReady, Observer, RunClosed
from fedgpt.core.options import RunOptions
from fedgpt.core.targets import Members, call, load_class
from fedgpt.report.published import published_event
from fedgpt.report.scores import LM_SCORES
from fedgpt.report.trackers.base import TrackedRun, Tracker
from fedgpt.storage.run_folder import read_lines

MEMBERS = Members("track", "track", Tracker)


def make_trackers(
    options: RunOptions, folder: Path, resumed_at: int, scores: Iterable[str] = LM_SCORES
) -> list[Observer]:
    """Make the trackers that `options.track` names; no file is opened before the first event.

    `resumed_at` is the version from which the run continues, 0 for a new run. `scores` names all
    scores of the task: with privacy=client, trackers get no other score. The trackers are observers
    like others: RunClosed closes them. Raises ConfigError with every problem that was found.
    """
    run = TrackedRun(options.name, folder, _dotted(asdict(options)), resumed_at)
    shown = tuple(scores) if options.privacy.unit == "client" else None
    return [_Guarded(name, tracker, run, shown) for name, tracker in _built(options)]


def tracker_problems(options: RunOptions) -> list[str]:
    """Return why `make_trackers` would raise ConfigError; empty where it would not."""
    try:
        _built(options)
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


def _built(options: RunOptions) -> list[tuple[str, Tracker]]:
    """Name and tracker for each entry of `track`; raises ConfigError."""
    built, problems = [], []
    for index, node in enumerate(options.track):
        try:
            if node in options.track[:index]:
                raise ConfigError(f"track={node}: stands twice in the list; leave one out")
            built.append(_build(node, options.trusted_packages))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return built


def _build(node: Any, trusted: Iterable[str]) -> tuple[str, Tracker]:
    if isinstance(node, Mapping) and isinstance(target := node.get("_target_"), str):
        cls = load_class("track", target, (MEMBERS.folder,), trusted)
        if not issubclass(cls, Tracker):
            raise ConfigError(
                f"track._target_={target}: must inherit from fedgpt.report.trackers.base.Tracker"
            )
        name, arguments = target, {key: value for key, value in node.items() if key != "_target_"}
    elif node in (known := MEMBERS.names()):
        name, cls, arguments = node, MEMBERS.load(node), {}
    else:
        raise ConfigError(
            f"track=[{node}]: allowed are {', '.join(known)}, or"
            f" {{_target_:package.module.Class}}{nearest(str(node), known)}"
        )
    return name, call("track", cls, arguments)


def _dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested options as dotted names.

    >>> _dotted({"seed": 0, "model": {"n_layer": 4}, "track": ["csv"]})
    {'seed': 0, 'model.n_layer': 4, 'track': ['csv']}
    """

    def walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    return dict(walk(options, ""))
