"""The figure of the updates: norms, angles and staleness, from metrics.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgpt.report.figures import BLUE, ORANGE, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

Lines = list[Mapping[str, Any]]  # lines of metrics.jsonl
Panel = tuple[str, Callable[["Axes"], None]]  # title, and the function that draws it


def updates_figure(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw norms, angles and staleness of the updates, as a PNG at `path`.

    `metrics` are the lines of metrics.jsonl. Panels without data are not drawn.
    """
    versions = [line for line in metrics if line.get("version")]
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


def _norms(metrics: Lines) -> Panel | None:
    found = {
        "mean of a version's updates": _series(metrics, "update_norm"),
        "server step": _series(metrics, "step_norm"),
    }
    # the norm of a step without updates is 0, which a logarithmic axis cannot show
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
        _draw_series(axis, found, len(metrics))
        axis.set_ylabel("L2 norm (log scale)")

    return "Length of updates and server steps", draw


def _log_ticks(ratio: float) -> Locator:
    """Return ticks at round numbers, also for values that stay within one power of ten."""
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if ratio < 10 else (1, 3) if ratio < 1000 else (1,))


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True)


def _angles(metrics: Lines) -> Panel | None:
    found = {
        "updates, mean over pairs": _series(metrics, "cosine"),
        "server step and the one before": _series(metrics, "step_correlation"),
    }
    if not any(found.values()):
        return None

    def draw(axis: Axes) -> None:
        axis.axhline(0, color="black", linewidth=0.8)
        _draw_series(axis, found, len(metrics))
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.2 * (high - low))  # room for the legend
        axis.set_ylabel("cosine")

    return "Agreement: 1 same direction, 0 unrelated", draw


def _staleness(metrics: Lines) -> Panel | None:
    counts: Counter[int] = Counter()
    for line in metrics:
        counts.update({int(tau): count for tau, count in (line.get("staleness") or {}).items()})
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
            else "Staleness: 0 for every update"
        ),
        draw,
    )


def _bases(metrics: Lines) -> Panel | None:
    """Return the panel of base versions in flight, or of updates in a step.

    In a synchronous run all jobs start from the newest version, so it is the panel of updates.
    """
    bases, accepted = _series(metrics, "bases"), _series(metrics, "accepted")
    asynchronous = max(bases.values(), default=0) > 1
    title, label, values = (
        ("Models that jobs in flight started from", "server versions", bases)
        if asynchronous or not accepted
        else ("Updates in a server step", "accepted updates", accepted)
    )
    if not values:
        return None

    def draw(axis: Axes) -> None:
        _draw_series(axis, {"": values}, len(metrics))
        axis.set_ylim(0, 1.15 * max(1, *values.values()))
        axis.yaxis.set_major_locator(_whole_numbers())
        axis.set_ylabel(label)

    return title, draw


def _series(metrics: Lines, name: str) -> dict[int, float]:
    """Return version -> value of the versions whose value is a finite number."""
    found = {line["version"]: float(line[name]) for line in metrics if line.get(name) is not None}
    return {version: value for version, value in found.items() if math.isfinite(value)}


def _draw_series(axis: Axes, series: dict[str, dict[int, float]], versions: int) -> None:
    """Draw up to two series by version; in a long run each is pale, with its running mean."""
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
