"""Pictures of a run. None uses pyplot: a run in a notebook leaves the user's plotting backend and
figures alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(records: list[dict[str, Any]], path: Path) -> None:
    """Held-out bits per byte against versions, tokens and bytes, as PNG; nothing is drawn without
    an evaluation.
    """
    scored = [r for r in records if "bits_per_byte" in r]
    if not scored:
        return
    axes_data = [
        ("server version", [r["version"] for r in scored]),
        ("tokens trained (millions)", [r["tokens"] / 1e6 for r in scored]),
        ("bytes up and down (MB)", [(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in scored]),
    ]
    heights = [r["bits_per_byte"] for r in scored]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (label, xs) in zip(axes, axes_data, strict=True):
        axis.plot(xs, heights, marker="o", markersize=3, color="#1f5fa8")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out bits per byte")
    axes[0].annotate(
        f"{heights[-1]:.3f}",
        (axes_data[0][1][-1], heights[-1]),
        textcoords="offset points",
        xytext=(-4, 8),
        ha="right",
    )
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a picture; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
