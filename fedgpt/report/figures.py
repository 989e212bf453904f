"""The figure of a run's score, and the common functions of all figures.

No figure of this package uses pyplot: in a notebook, a run would switch the plotting backend and
draw into the user's open figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgpt.report.scores import label, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, PALE, GREY, FAINT = "#1f5fa8", "#c46210", "#9dbbdc", "#a8b0b8", "#e4e6e8"


def loss_figure(metrics: Sequence[Mapping[str, Any]], path: Path, score: str = "loss") -> None:
    """Draw the held-out score against versions, tokens and bytes, as a PNG at `path`.

    `score` is the name of the run's score; scores.py chooses the score that is drawn. No figure is
    drawn if no version was evaluated. Lines without bytes (published.py) have no axis of bytes.
    """
    scored = [line for line in metrics if shown(line, score)]
    if not scored:
        return
    name = shown(scored[-1], score) or score
    axes_data = [
        ("server version", [line["version"] for line in scored]),
        ("tokens trained (millions)", [line["tokens"] / 1e6 for line in scored]),
    ]
    if "bytes_up" in scored[-1]:
        moved = [(line["bytes_up"] + line["bytes_down"]) / 1e6 for line in scored]
        axes_data.append(("bytes up and down (MB)", moved))
    heights = [line[name] for line in scored]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(axes_data), sharey=True)
    for axis, (x_label, xs) in zip(axes, axes_data, strict=True):
        axis.plot(xs, heights, marker="o", markersize=3, color=BLUE)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"held-out {label(name)}")
    axes[0].annotate(
        f"{heights[-1]:.3f}",
        (axes_data[0][1][-1], heights[-1]),
        textcoords="offset points",
        xytext=(-4, 8),
        ha="right",
    )
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
