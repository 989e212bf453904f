"""The progress of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from fedgpt.core.events import (
    ClientJoined,
    Event,
    JobSent,
    MetricsReady,
    PacingChanged,
    ReplyRejected,
    RunOpened,
    UpdateAccepted,
    VersionMade,
)
from fedgpt.core.lines import one_line
from fedgpt.core.options import RunOptions
from fedgpt.report.scores import in_progress

STRAY = ("late", "duplicate", "unknown_job")  # codes of replies to jobs that are not in flight


class ProgressDisplay:
    """Observer that prints one line for each finished version and keeps a live bar below them.

    The live bar is shown on a terminal only. Events arrive on one thread (core/events.py); `say`
    and the `with` statement belong to the main thread, before the first event and after the last.
    """

    def __init__(
        self,
        options: RunOptions,
        console: Console | None = None,
        switches: bool = False,
        pacing: str | None = None,
        score: str = "loss",
    ):
        """Prepare a display; nothing is printed yet.

        `switches`: the strategy may change the pacing. `pacing`: the pacing that an earlier process
        of this run had changed to. `score`: the name of the run's score.
        """
        self.options, self.console, self.score = options, console or Console(highlight=False), score
        self._pacing = pacing or options.pace.name
        # such a run ends after a number of tokens, so its number of versions is not known
        self._by_tokens = bool(options.tokens or switches)
        self._tokens_end = options.tokens  # 0: not known, or the run ends after `rounds` versions
        self._first_version = 0  # first version of this process; above 0 in a resumed run
        self._first: Mapping[str, Any] | None = None  # metrics of this process's first version
        self._newest: Mapping[str, Any] | None = None  # metrics of the newest version
        self._began = time.monotonic()
        self._in_flight: set[tuple[str, int]] = set()  # client and number of jobs in flight
        self._earlier = 0  # number of jobs in flight that an earlier process sent
        self._answered = 0  # number of replies for the open version
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("version"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[state]}"),
        )
        total = None if self._by_tokens else options.rounds
        self._bar.add_task("run", total=total, state="starting")

    def say(self, text: str) -> None:
        """Print text above the live bar."""
        self.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> ProgressDisplay:
        if self.console.is_terminal:
            self._live = Live(
                Group(self._bar), console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, event: Event) -> None:
        """Show one event, or ignore it."""
        match event:
            case RunOpened():
                self._first_version = event.version
                self._began = time.monotonic()
                self._tokens_end = event.tokens_total if self._by_tokens else 0
            case ClientJoined():
                self.say(f"  client {event.client} joins, with {count(event.tokens)} tokens")
            case JobSent():
                self._in_flight.add((event.client, event.number))
            case UpdateAccepted():
                self._ended(event.client, event.number, answered=True)
            case ReplyRejected():
                if event.code not in STRAY:
                    self._ended(event.client, event.number, answered=event.code != "no_reply")
                who = f"client {event.client} job {event.number}"
                why = f" ({event.detail})" if event.detail else ""
                self.say("  ! " + one_line(f"{who} rejected: {event.code}{why}"))
            case PacingChanged():
                self._pacing = event.pacing
                self.say(f"  pace={event.pacing} from version {event.version} on: {event.reason}")
            case VersionMade():
                self._newest, self._answered = event.metrics, 0
            case MetricsReady():
                self._finished(event.metrics)
        version = self._newest["version"] if self._newest else self._first_version
        self._bar.update(self._bar.task_ids[0], completed=version, state=self._state())

    def line(self, metrics: Mapping[str, Any]) -> str:
        """Return one finished version as text."""
        total, version, tokens = self.options.rounds, metrics["version"], metrics["tokens"]
        parts = [
            f"version {version}"
            if self._by_tokens
            else f"version {version:>{len(str(total))}}/{total}"
        ]
        of = f"/{count(self._tokens_end)}" if self._tokens_end and tokens else ""
        parts.append(f"{count(tokens)}{of} tokens")
        if metrics.get("train_loss") is not None:
            parts.append(f"train {metrics['train_loss']:.3f}")
        if scores := in_progress(metrics, self.score):
            parts.append(scores)
        if metrics.get("epsilon") is not None:
            mark = "NOT PRIVATE, " if self.options.privacy.rng == "seeded" else ""
            parts.append(f"{mark}epsilon {metrics['epsilon']:.3g}")
        parts.append(f"up {size(metrics['bytes_up'])}, down {size(metrics['bytes_down'])}")
        seconds = metrics["wall_seconds"]
        if version and tokens and seconds:
            if metrics.get("virtual_seconds") is not None:
                parts.append(f"{clock(metrics['virtual_seconds'])} virtual")
            parts.append(f"{count(tokens / seconds)} tok/s")
            here = seconds - (self._first["wall_seconds"] if self._first else 0.0)
            if here > 0:  # 0 at the first version of a resumed run, when no speed is known yet
                parts.append(f"{clock(here * self._to_do(version, tokens))} left")
        return " | ".join(parts)

    def _finished(self, metrics: Mapping[str, Any]) -> None:
        """Print a version's line; in asynchronous runs only some versions get a line."""
        if self._first is None:
            self._first = metrics
            self._earlier += metrics.get("in_flight", 0)
        if self._pacing == "cohort" or in_progress(metrics, self.score):
            self.say(self.line(metrics))

    def _ended(self, client: str, number: int, answered: bool) -> None:
        """Record that a job is no longer in flight; `answered`: its client has sent a reply."""
        if (client, number) not in self._in_flight:
            # this may happen before the first metrics, which contain the number of these jobs
            self._earlier -= 1
        self._in_flight.discard((client, number))
        self._answered += answered

    def _state(self) -> str:
        """Return the text beside the bar."""
        parts = [
            f"{max(0, len(self._in_flight) + self._earlier)} clients in flight",
            f"{self._answered} back",
        ]
        seconds, newest = time.monotonic() - self._began, self._newest
        if newest and newest["version"] > self._first_version and seconds:
            version, tokens = newest["version"], newest["tokens"]
            parts.append(f"{count((tokens - self._tokens_before) / seconds)} tok/s")
            parts.append(f"{size(newest['bytes_up'] + newest['bytes_down'])} moved")
            parts.append(f"{clock(seconds * self._to_do(version, tokens))} left")
        return ", ".join(parts)

    @property
    def _tokens_before(self) -> int:
        """Tokens that earlier processes of this run have trained."""
        return self._first["tokens"] if self._first else 0

    def _to_do(self, version: int, tokens: int) -> float:
        """Return the rest of the run as a multiple of the part that this process has done."""
        if self._by_tokens:
            first, now, end = self._tokens_before, tokens, self._tokens_end
        else:
            first, now, end = self._first_version, version, self.options.rounds
        return max(0, end - now) / max(1, now - first)


def rule(options: RunOptions) -> str:
    """Return the name of the strategy's class."""
    return options.strategy["_target_"].rsplit(".", 1)[-1]


def count(value: float) -> str:
    """Write a count with three digits.

    >>> count(1234567), count(950), count(41800), count(999999)
    ('1.23M', '950', '41.8k', '1M')
    """
    return _three_digits(value, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """Write a number of bytes in decimal units.

    >>> size(0), size(5_300_000)
    ('0 B', '5.3 MB')
    """
    return _three_digits(value, (" B", " kB", " MB", " GB", " TB"))


def _three_digits(value: float, units: tuple[str, ...]) -> str:
    for power in range(len(units) - 1, 0, -1):
        if value >= 0.9995 * 1000**power:  # larger values are rounded up to this unit
            return f"{value / 1000**power:.3g}{units[power]}"
    return f"{value:.0f}{units[0]}"


def clock(seconds: float) -> str:
    """Write a duration as minutes and seconds, or as hours and minutes.

    >>> clock(65), clock(7300)
    ('1:05', '2h01')
    """
    rounded = round(seconds)
    if rounded >= 3600:
        return f"{rounded // 3600}h{rounded % 3600 // 60:02d}"
    return f"{rounded // 60}:{rounded % 60:02d}"
