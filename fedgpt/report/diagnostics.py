"""Pictures that explain a run: who worked when, and what the updates were like; both from the run's
records alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedgpt.report.figures import save
from fedgpt.report.progress import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

BLUE, ORANGE, PALE, GREY, FAINT = "#1f5fa8", "#c46210", "#9dbbdc", "#a8b0b8", "#e4e6e8"
MOST_ROWS, MOST_SPANS, MOST_STEPS, MOST_HEADERS = 24, 400, 60, 3  # what a page can show
HEADER = 0.9  # rows that the words of a switch of pacing take
OUTCOMES = {
    "accepted": (BLUE, "update accepted"),
    "rejected": (ORANGE, "rejected or no reply"),
    "open": (PALE, "still at work at the end"),
    "waiting": (FAINT, "sent, waits for a worker"),
}
TRAINING = ("dispatch", "accept", "reject", "version")
Panel = tuple[str, Callable[["Axes"], None]]


class Span(NamedTuple):
    """A job or a part of it, up to what became of it, on the run's clock."""

    start: float
    end: float
    outcome: str  # a key of OUTCOMES


@dataclass(frozen=True)
class Activity:
    """What one client did in a run."""

    spans: tuple[Span, ...]
    tokens: int  # of accepted updates
    busy_seconds: float
    idle_share: float  # of the time from the run's first dispatch to its last reply or version
    accepted: int  # jobs that ended so
    rejected: int


def activity(events: Sequence[dict[str, Any]]) -> dict[str, Activity]:
    """Every client that got a job, in the order of ids; a reply to no open job (late, duplicate)
    changes nothing.
    """
    began: dict[tuple[Any, Any], float] = {}
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    tokens: Counter[str] = Counter()
    # The last evaluation is nobody's idle time.
    training = [event for event in events if event["event"] in TRAINING and "seconds" in event]
    for event in training:
        kind, client = event["event"], event.get("client", "")
        key = client, event.get("number")
        if kind == "dispatch":
            began[key] = event["seconds"]  # a job sent again after a restart begins again
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
    """A job that its client was at for the last `seconds`; before that it waited, as where clients
    share workers.
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


def timeline_figure(events: Sequence[dict[str, Any]], path: Path) -> None:
    """Jobs by client over the run's clock with tokens and idle share beside them, as PNG; nothing
    without a job.
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
    jobs.set_ylim(len(shown) - 0.5, -0.5 - HEADER * header)  # the first client on top
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
    """Whose jobs these are, and which part of the run."""
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
    """One row of bars for each client, in the colours of their outcomes."""
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
                # an edge must not cover a bar
                linewidth=[min(0.8, 80 * length / (end - begin)) for length in lengths],
            )
    names = [f"client {client}" if client.isdigit() else _short(client, 18) for client in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _draw_steps(axis: Axes, steps: list[float], rows: int) -> None:
    """Server steps as lines behind the bars, seen between them: in front they would hide where jobs
    end.
    """
    axis.vlines(
        steps, -0.5, rows - 0.5, color="black", linewidth=0.8, label="server step", zorder=1.5
    )


def _draw_switch(
    axis: Axes, switch: dict[str, Any], number: int, to_the_left: bool, scale: float
) -> None:
    """A dashed line with its words above the first row, on the side where there is room for
    them.
    """
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
    """A narrow panel of horizontal bars with their values."""
    bars = axis.barh(range(len(lengths)), lengths, height=0.72, color=color)
    digits = 0 if most or max(lengths) >= 10 else 1
    axis.bar_label(bars, [f"{length:,.{digits}f}" for length in lengths], padding=2, fontsize=7)
    axis.set_xlim(0, 1.45 * (most or max(lengths) or 1))  # room for the values
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    axis.set_title(label, loc="left", fontsize=9)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _window(spans: list[Span]) -> tuple[float, float]:
    """From the first dispatch to the end, or to where more jobs would begin than can be told
    apart.
    """
    starts = sorted(span.start for span in spans)
    end = max(span.end for span in spans)
    if len(starts) > MOST_SPANS and starts[MOST_SPANS] > starts[0]:
        end = starts[MOST_SPANS]
    return starts[0], max(end, starts[0] + 1e-3)


def updates_figure(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Norms, angles and staleness of the updates by version, as PNG; panels without data are left
    out.
    """
    versions = [record for record in records if record.get("version")]
    panels = [
        panel
        for make in (_norms, _angles, _staleness, _bases)
        if (panel := make(versions)) is not None
    ]
    if not panels:
        return

    from matplotlib.figure import Figure

    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(min(12, 5.5 * columns), 3.2 * rows), layout="constrained")
    for axis, (title, draw) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True
    ):
        draw(axis)
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.xaxis.label.set_size(9)
        axis.yaxis.label.set_size(9)
    figure.align_ylabels()
    save(figure, path)


def _norms(records: list[dict[str, Any]]) -> Panel | None:
    found = {
        "mean of a version's updates": _series(records, "update_norm"),
        "server step": _series(records, "step_norm"),
    }
    # 0: a step without updates
    found = {label: {v: y for v, y in ys.items() if y > 0} for label, ys in found.items()}
    values = [y for ys in found.values() for y in ys.values()]
    if not values:
        return None

    def draw(axis: Axes) -> None:
        low, high = min(values), max(values)
        axis.set_yscale("log", subs=[])
        axis.set_ylim(low / 1.2, high * 1.3 * (high / low) ** 0.25)  # room for the legend
        axis.yaxis.set_major_locator(_log_ticks(high / low))
        axis.yaxis.set_major_formatter("{x:g}")
        _draw_series(axis, found, len(records))
        axis.set_ylabel("L2 norm (log scale)")

    return "Length of updates and server steps", draw


def _log_ticks(ratio: float) -> Locator:
    """Ticks at round numbers, also where the values stay within less than a power of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 10 else (1, 3) if ratio < 1000 else (1,))


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True)


def _angles(records: list[dict[str, Any]]) -> Panel | None:
    found = {
        "updates, mean over pairs": _series(records, "cosine"),
        "server step and the one before": _series(records, "step_correlation"),
    }
    if not any(found.values()):
        return None

    def draw(axis: Axes) -> None:
        axis.axhline(0, color="black", linewidth=0.8)
        _draw_series(axis, found, len(records))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
        axis.set_ylabel("cosine")

    return "Agreement: 1 same direction, 0 unrelated", draw


def _staleness(records: list[dict[str, Any]]) -> Panel | None:
    counts: Counter[int] = Counter()
    for record in records:
        counts.update({int(tau): count for tau, count in (record.get("staleness") or {}).items()})
    total = counts.total()
    if not total:
        return None
    mean = sum(tau * count for tau, count in counts.items()) / total

    def draw(axis: Axes) -> None:
        axis.bar(
            list(counts), [100 * count / total for count in counts.values()], color=BLUE, width=0.8
        )
        axis.set_xlim(-0.6, max(3, *counts) + 0.6)
        axis.xaxis.set_major_locator(_whole_numbers())
        axis.set_xlabel("server versions since download")
        axis.set_ylabel("% of accepted updates")

    return (
        (
            f"Staleness: mean {mean:.2f}, largest {max(counts)}"
            if mean
            else "Staleness: every update was fresh"
        ),
        draw,
    )


def _bases(records: list[dict[str, Any]]) -> Panel | None:
    """Base versions alive; where that is no news (each version waits for its own updates), updates
    per version.
    """
    bases, accepted = _series(records, "bases"), _series(records, "accepted")
    asynchronous = max(bases.values(), default=0) > 1
    title, label, values = (
        ("Models that jobs in flight started from", "server versions", bases)
        if asynchronous or not accepted
        else ("Updates in a server step", "accepted updates", accepted)
    )
    if not values:
        return None

    def draw(axis: Axes) -> None:
        _draw_series(axis, {"": values}, len(records))
        axis.set_ylim(0, 1.15 * max(1, *values.values()))
        axis.yaxis.set_major_locator(_whole_numbers())
        axis.set_ylabel(label)

    return title, draw


def _series(records: list[dict[str, Any]], name: str) -> dict[int, float]:
    """version -> value, where there is a finite one."""
    found = {
        record["version"]: float(record[name]) for record in records if record.get(name) is not None
    }
    return {version: value for version, value in found.items() if math.isfinite(value)}


def _draw_series(axis: Axes, series: dict[str, dict[int, float]], versions: int) -> None:
    """Label -> series by version, in blue and orange; those of a long run are light under their
    running mean.
    """
    window = versions // 20
    for (label, values), color in zip(series.items(), (BLUE, ORANGE), strict=False):
        if not values:
            continue
        xs, ys = list(values), list(values.values())
        if window < 3 or len(xs) < 2 * window:
            axis.plot(xs, ys, marker="o", markersize=3, color=color, label=label)
            continue
        ones = np.ones(window)
        mean = np.convolve(ys, ones, "same") / np.convolve(np.ones(len(ys)), ones, "same")
        axis.plot(xs, ys, color=color, alpha=0.3, linewidth=0.8)
        axis.plot(xs, mean, color=color, linewidth=1.6, label=label)
    axis.set_xlim(0, 1.03 * max(max(values, default=1) for values in series.values()))
    axis.xaxis.set_major_locator(_whole_numbers())
    axis.set_xlabel("server version" if window < 3 else f"server version (bold: mean of {window})")
    if any(series):
        axis.legend(fontsize=8, loc="upper right")


def _natural(client: str) -> tuple[Any, ...]:
    """Order of ids in which 10 follows 9.

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
    """(seconds in it, name) of the unit in which a duration is a handy number."""
    units = ((3600.0, "hours"), (60.0, "minutes"))
    return next((unit for unit in units if seconds >= 5 * unit[0]), (1.0, "seconds"))
