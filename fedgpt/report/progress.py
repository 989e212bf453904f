"""The run as it goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from fedgpt.core.options import RunOptions

STRAY = ("late", "duplicate", "unknown_job")  # replies to what is not in flight


class ProgressDisplay:
    """Observer of the server loop: one line per finished version; on a terminal, a live bar below
    them.
    """

    def __init__(
        self,
        options: RunOptions,
        console: Console | None = None,
        switches: bool = False,
        pacing: str | None = None,
    ):
        """`switches`: the strategy may change the pacing; `pacing`: what it had come to in an
        earlier sitting.
        """
        self.options, self.console = options, console or Console(highlight=False)
        self._switches, self._pacing = switches, pacing or options.pace.name
        # where the run ends; 0: after `rounds` versions, or not known before "open"
        self._end = options.tokens
        self._began = time.monotonic()
        self._first_version = 0
        # the first record: a resumed run has trained before
        self._first: dict[str, Any] | None = None
        # (client, job number) that were sent and have not come back
        self._flying: set[tuple[str, int]] = set()
        self._earlier = 0  # jobs in flight that an earlier sitting sent
        self._tokens = self._version = self._back = 0
        self._bytes = 0
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("version"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[state]}"),
        )
        # a run that ends after so many tokens has no known number of versions
        total = None if self._by_tokens else options.rounds
        self._task: TaskID = self._bar.add_task("run", total=total, state="starting")

    @property
    def _by_tokens(self) -> bool:
        return bool(self.options.tokens or self._switches)

    def say(self, text: str) -> None:
        """Print text above the live line."""
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

    def __call__(self, event: str, about: dict[str, Any]) -> None:
        """Take one event of the loop."""
        if event == "open":
            self._first_version = self._version = about["version"]
            self._began = time.monotonic()
            self._end = about["tokens_total"] if self._by_tokens else 0
        elif event == "dispatch":
            self._flying.add((about["client"], about["number"]))
        elif event == "accept":
            self._landed(about, back=True)
        elif event == "reject":
            if about["code"] not in STRAY:
                self._landed(about, back=about["code"] != "no_reply")
            who = f"client {about.get('client')} job {about.get('number')}"
            why = f" ({about['detail']})" if about.get("detail") else ""
            self.say("  ! " + one_line(f"{who} rejected: {about['code']}{why}"))
        elif event == "pacing":
            self._pacing = about["pacing"]
            self.say(
                f"  pace={about['pacing']} from version {about['version']} on: {about['reason']}"
            )
        elif event == "version":
            self._version, self._tokens = about["version"], about["tokens"]
            self._bytes = about["bytes_up"] + about["bytes_down"]
            self._back = 0
        elif event == "record":
            if self._first is None:
                self._first = about
                self._earlier += about.get("in_flight", 0)
            # asynchronous steps are too many for a line each
            if "loss" in about or self._pacing == "cohort":
                self.say(self.line(about))
        self._bar.update(self._task, completed=self._version, state=self._state())

    def line(self, record: dict[str, Any]) -> str:
        """One finished version in words."""
        total, version = self.options.rounds, record["version"]
        parts = [
            f"version {version}"
            if self._by_tokens
            else f"version {version:>{len(str(total))}}/{total}"
        ]
        of = f"/{count(self._end)}" if self._end and record["tokens"] else ""
        parts.append(f"{count(record['tokens'])}{of} tokens")
        if record.get("train_loss") is not None:
            parts.append(f"train {record['train_loss']:.3f}")
        if "loss" in record:
            parts.append(f"held-out {record['loss']:.3f} = {record['bits_per_byte']:.3f} bits/byte")
        if record.get("epsilon") is not None:
            parts.append(f"epsilon {record['epsilon']:.3g}")
        parts.append(f"up {size(record['bytes_up'])}, down {size(record['bytes_down'])}")
        seconds = record["wall_seconds"]
        if record["version"] and record["tokens"] and seconds:
            if record.get("virtual_seconds") is not None:
                parts.append(f"{clock(record['virtual_seconds'])} virtual")
            parts.append(f"{count(record['tokens'] / seconds)} tok/s")
            here = seconds - (self._first["wall_seconds"] if self._first else 0.0)
            # the version that a resumed run began with says nothing of this sitting's speed
            if here > 0:
                parts.append(f"{clock(here * self._to_do(version, record['tokens']))} left")
        return " | ".join(parts)

    def _landed(self, about: dict[str, Any], back: bool) -> None:
        """A job is no longer in flight; `back`: its client has answered."""
        key = about["client"], about["number"]
        if key not in self._flying:
            self._earlier -= 1  # may come before the first record, which tells how many there were
        self._flying.discard(key)
        self._back += back

    def _state(self) -> str:
        seconds = time.monotonic() - self._began
        done = self._version - self._first_version
        parts = [
            f"{max(0, len(self._flying) + self._earlier)} clients in flight",
            f"{self._back} back",
        ]
        if done and seconds:
            parts.append(f"{count((self._tokens - self._tokens_before) / seconds)} tok/s")
            parts.append(f"{size(self._bytes)} moved")
            parts.append(f"{clock(seconds * self._to_do(self._version, self._tokens))} left")
        return ", ".join(parts)

    @property
    def _tokens_before(self) -> int:
        return self._first["tokens"] if self._first else 0

    def _to_do(self, version: int, tokens: int) -> float:
        """What is left of the run, as a multiple of what is done; a resumed run counts from where
        it began.
        """
        if self._by_tokens:
            first, now, end = self._tokens_before, tokens, self._end
        else:
            first, now, end = self._first_version, version, self.options.rounds
        return max(0, end - now) / max(1, now - first)


def one_line(text: str) -> str:
    """`text` without line breaks and control codes: a client's words must not take over the
    terminal.

    >>> one_line("no memory\\n  at\\x1b[2J step 3")
    'no memory at [2J step 3'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def rule(options: RunOptions) -> str:
    """The name of the strategy's class."""
    return options.strategy["_target_"].rsplit(".", 1)[-1]


def count(value: float) -> str:
    """A count in three figures.

    >>> count(1234567), count(950), count(41800), count(999999)
    ('1.23M', '950', '41.8k', '1M')
    """
    return _three_figures(value, ("", "k", "M", "G", "T"))


def size(value: float) -> str:
    """Bytes in decimal units.

    >>> size(0), size(5_300_000)
    ('0 B', '5.3 MB')
    """
    return _three_figures(value, (" B", " kB", " MB", " GB", " TB"))


def _three_figures(value: float, units: tuple[str, ...]) -> str:
    for power in range(len(units) - 1, 0, -1):
        if value >= 0.9995 * 1000**power:  # from here on it is rounded up to this unit
            return f"{value / 1000**power:.3g}{units[power]}"
    return f"{value:.0f}{units[0]}"


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, or hours and minutes.

    >>> clock(65), clock(7300)
    ('1:05', '2h01')
    """
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"
