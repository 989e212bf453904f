"""The timeline figure: the jobs of each client on the run's clock, from events.jsonl."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedgpt.core.lines import one_line
from fedgpt.report.figures import BLUE, FAINT, GREY, ORANGE, PALE, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# limits of one figure, so that its details can be distinguished
MOST_ROWS = 24  # largest number of clients
MOST_SPANS = 400  # largest number of jobs
MOST_STEPS = 60  # largest number of server steps
MOST_HEADERS = 3  # largest number of rows of text above the first client
HEADER = 0.9  # height of a row of text, as a multiple of a client's row
OUTCOMES = {
    "accepted": (BLUE, "update accepted"),
    "rejected": (ORANGE, "rejected or no reply"),
    "open": (PALE, "in flight at the end"),
    "waiting": (FAINT, "waiting for a worker"),
}
TRAINING = ("dispatch", "accept", "reject", "version")  # events from which the figure is drawn


class Span(NamedTuple):
    """A job, or a part of one, on the run's clock."""

    start: float
    end: float
    outcome: str  # a key of OUTCOMES


@dataclass(frozen=True)
class Activity:
    """The jobs of one client in a run."""

    spans: tuple[Span, ...]
    tokens: int  # tokens of accepted updates
    busy_seconds: float
    idle_share: (
        float  # share of the time from the run's first dispatch to its last reply or version
    )
    accepted: int  # number of jobs with an accepted update
    rejected: int  # number of jobs with a rejected reply or without a reply


def activity(events: Sequence[Mapping[str, Any]]) -> dict[str, Activity]:
    """Return the activity of each client with a job, in the order of client ids.

    `events` are the lines of events.jsonl. A reply to a job that is not in flight (late, duplicate)
    changes nothing.
    """
    began: dict[tuple[Any, Any], float] = {}
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    tokens: Counter[str] = Counter()
    # without the events of the last evaluation, when clients are not idle but finished
    training = [event for event in events if event["event"] in TRAINING and "seconds" in event]
    for event in training:
        kind, client = event["event"], event.get("client", "")
        key = client, event.get("number", event.get("task"))  # older runs call the number task
        if kind == "dispatch":
            began[key] = event["seconds"]  # a job that is sent again after a restart starts again
        elif kind in ("accept", "reject") and key in began:
            spans[client] += _spans(
                began.pop(key), event["seconds"], f"{kind}ed", event.get("train_seconds")
            )
            tokens[client] += event["tokens"] if kind == "accept" else 0
    end = max((event["seconds"] for event in training), default=0.0)
    for (client, _), start in began.items():
        spans[client].append(Span(start, end, "open"))
    first = min((span.start for found in spans.values() for span in found), default=0.0)
    return {
        client: _activity(tuple(sorted(spans[client])), tokens[client], end - first)
        for client in sorted(spans, key=_natural)
    }


def _spans(start: float, end: float, outcome: str, seconds: float | None) -> list[Span]:
    """Split a job into waiting and work: the client trained for the last `seconds` of it.

    A job waits if clients share worker processes.
    """
    begins = start if seconds is None else max(start, end - seconds)
    if begins - start < 0.01 * (end - start):
        return [Span(start, end, outcome)]
    return [Span(start, begins, "waiting"), Span(begins, end, outcome)]


def _activity(spans: tuple[Span, ...], tokens: int, seconds: float) -> Activity:
    busy = math.fsum(span.end - span.start for span in spans if span.outcome != "waiting")
    outcomes = Counter(span.outcome for span in spans)
    idle = max(0.0, 1 - busy / seconds) if seconds > 0 else 0.0
    return Activity(spans, tokens, busy, idle, outcomes["accepted"], outcomes["rejected"])


def timeline_figure(events: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each client's jobs, tokens and idle share, as a PNG at `path`.

    `events` are the lines of events.jsonl. No figure is drawn if no client got a job.
    """
    everyone = activity(events)
    if not everyone:
        return
    shown = dict(list(everyone.items())[:MOST_ROWS])
    begin, end = window = _window([span for did in shown.values() for span in did.spans])
    last = max(span.end for did in everyone.values() for span in did.spans)
    inside = [event for event in events if begin <= event.get("seconds", -math.inf) <= end]
    switches = [event for event in inside if event["event"] == "pacing"]
    steps = [event["seconds"] for event in inside if event["event"] == "version"]

    from matplotlib.figure import Figure

    header = min(len(switches), MOST_HEADERS)
    figure = Figure(figsize=(11, 1.75 + 0.24 * (max(len(shown), 3) + header)), layout="constrained")
    jobs, tokens, idle = figure.subplots(1, 3, sharey=True, width_ratios=(7, 1.3, 1.3))
    scale, unit = _unit(end - begin)
    _draw_jobs(jobs, shown, window, scale)
    if 0 < len(steps) <= MOST_STEPS:
        _draw_steps(jobs, [step / scale for step in steps], len(shown))
    for number, switch in enumerate(switches):
        _draw_switch(jobs, switch, number, switch["seconds"] > (begin + end) / 2, scale)
    jobs.set_ylim(len(shown) - 0.5, -0.5 - HEADER * header)  # the first client is at the top
    jobs.set_xlim(begin / scale, end / scale)
    jobs.set_xlabel(f"time on the run's clock ({unit})", fontsize=9)
    _draw_bars(tokens, [did.tokens / 1e3 for did in shown.values()], "tokens (thousands)", BLUE)
    _draw_bars(idle, [100 * did.idle_share for did in shown.values()], "idle (% of run)", GREY, 100)
    jobs.set_title(_headline(len(shown), len(everyone), window, last), loc="left", fontsize=10)
    legend = {
        label: handle for handle, label in zip(*jobs.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower left",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    save(figure, path)


def _headline(shown: int, everyone: int, window: tuple[float, float], last: float) -> str:
    """Return the title: which clients, and which part of the run."""
    begin, end = window
    scale, unit = _unit(end - begin)
    who = (
        f"{shown} of {everyone} clients"
        if shown < everyone
        else f"{shown} client{'s' * (shown > 1)}"
    )
    part = (
        f"the first {_short_number((end - begin) / scale)} of"
        f" {_short_number((last - begin) / scale)} {unit}"
    )
    return f"Jobs of {who}: {part} (bars on the right: all)" if end < last else f"Jobs of {who}"


def _draw_jobs(
    axis: Axes, shown: dict[str, Activity], window: tuple[float, float], scale: float
) -> None:
    """Draw one row of bars for each client, in the colours of their outcomes."""
    begin, end = window
    for outcome, (color, label) in OUTCOMES.items():
        for row, did in enumerate(shown.values()):
            spans = [span for span in did.spans if span.outcome == outcome and span.start < end]
            if not spans:
                continue
            lengths = [span.end - span.start for span in spans]
            axis.broken_barh(
                [
                    (span.start / scale, length / scale)
                    for span, length in zip(spans, lengths, strict=True)
                ],
                (row - 0.36, 0.72),
                color=color,
                label=label,
                zorder=2,
                edgecolor="white",
                # short bars get thinner edges, which would otherwise hide them
                linewidth=[min(0.8, 80 * length / (end - begin)) for length in lengths],
            )
    names = [f"client {client}" if client.isdigit() else _short(client, 18) for client in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _draw_steps(axis: Axes, steps: list[float], rows: int) -> None:
    """Draw server steps as lines behind the bars, so that they do not hide the ends of jobs."""
    axis.vlines(
        steps, -0.5, rows - 0.5, color="black", linewidth=0.8, label="server step", zorder=1.5
    )


def _draw_switch(
    axis: Axes, switch: Mapping[str, Any], number: int, to_the_left: bool, scale: float
) -> None:
    """Draw a change of the pacing as a dashed line, with its reason on the side that has room."""
    where = switch["seconds"] / scale
    axis.axvline(where, color=ORANGE, linestyle="--", linewidth=1.2, zorder=3)
    words = f"{switch['pacing']}: {_short(str(switch.get('reason') or ''), 48)}".removesuffix(": ")
    axis.annotate(
        words,
        (where, -0.5 - HEADER * (number % MOST_HEADERS + 0.5)),
        va="center",
        fontsize=8,
        color=ORANGE,
        ha="right" if to_the_left else "left",
        xytext=(-4 if to_the_left else 4, 0),
        textcoords="offset points",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        zorder=4,
        parse_math=False,
    )


def _draw_bars(
    axis: Axes, lengths: list[float], label: str, color: str, most: float | None = None
) -> None:
    """Draw a narrow panel of horizontal bars with their values."""
    bars = axis.barh(range(len(lengths)), lengths, height=0.72, color=color)
    digits = 0 if most or max(lengths) >= 10 else 1
    axis.bar_label(bars, [f"{length:,.{digits}f}" for length in lengths], padding=2, fontsize=7)
    axis.set_xlim(0, 1.45 * (most or max(lengths) or 1))  # room for the values
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    axis.set_title(label, loc="left", fontsize=9)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _window(spans: list[Span]) -> tuple[float, float]:
    """Return start and end of the time that is shown: at most MOST_SPANS jobs begin in it."""
    starts = sorted(span.start for span in spans)
    end = max(span.end for span in spans)
    if len(starts) > MOST_SPANS and starts[MOST_SPANS] > starts[0]:
        end = starts[MOST_SPANS]
    return starts[0], max(end, starts[0] + 1e-3)


def _natural(client: str) -> tuple[Any, ...]:
    """Return a key that sorts ids so that 10 follows 9.

    >>> sorted(["c10", "c9", "2", "b"], key=_natural)
    ['2', 'b', 'c9', 'c10']
    """
    return tuple(
        int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"(\d+)", client))
    )


def _short(text: str, most: int) -> str:
    text = one_line(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _short_number(value: float) -> str:
    return f"{value:,.{0 if value >= 20 else 1}f}"


def _unit(seconds: float) -> tuple[float, str]:
    """Return seconds and name of the unit that suits a duration."""
    units = ((3600.0, "hours"), (60.0, "minutes"))
    return next((unit for unit in units if seconds >= 5 * unit[0]), (1.0, "seconds"))
