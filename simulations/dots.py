"""A figure that several studies share: a dot for each mean and a line from minimum to maximum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from common import COLOURS
from matplotlib import pyplot


def draw_dots(
    series: Mapping[str, Mapping[str, Mapping[str, float]]], label: str, path: Path
) -> None:
    """Draw `series` -> row -> {mean, min, max}: rows from top to bottom, one colour a series."""
    names = list(dict.fromkeys(row for rows in series.values() for row in rows))
    shared = sum(map(len, series.values())) > len(names)  # whether rows have several series
    figure, axis = pyplot.subplots(
        figsize=(7, 1.2 + (0.55 if shared else 0.3) * len(names)), layout="constrained"
    )
    for number, ((name, rows), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        offset = 0.14 * (number - (len(series) - 1) / 2) if shared else 0.0
        heights = [names.index(row) + offset for row in rows]
        axis.hlines(
            heights,
            [r["min"] for r in rows.values()],
            [r["max"] for r in rows.values()],
            color=colour,
        )
        axis.plot(
            [r["mean"] for r in rows.values()], heights, "o", markersize=5, color=colour, label=name
        )
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
