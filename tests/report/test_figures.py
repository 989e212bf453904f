"""The figure is a picture, and of the numbers that it was given."""

from __future__ import annotations

import os
import subprocess
import sys

import matplotlib.image
import pytest

from fedgpt.report.figures import loss_figure


def record(version: int, **scores) -> dict:
    return {
        "version": version,
        "tokens": 2_000_000 * version,
        "bytes_up": 10**6,
        "bytes_down": 2 * 10**6,
        **scores,
    }


RECORDS = [
    record(0, bits_per_byte=8.0),
    record(1),
    record(2, bits_per_byte=6.5),
    record(3, bits_per_byte=6.25),
]


def test_a_png_that_can_be_read_is_drawn(tmp_path):
    path = tmp_path / "figures" / "loss.png"
    loss_figure(RECORDS, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert width > 2 * height > 400
    assert pixels[..., :3].std() > 0.01, "not an empty page"


def test_it_shows_what_was_scored_and_nothing_else(tmp_path, drawn):
    loss_figure(RECORDS, tmp_path / "loss.png")
    (figure,) = drawn
    lines = [axis.lines[0] for axis in figure.axes]
    assert [list(line.get_xdata()) for line in lines] == [[0, 2, 3], [0, 4, 6], [3, 3, 3]]
    assert all(list(line.get_ydata()) == [8.0, 6.5, 6.25] for line in lines)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "server version", "tokens trained (millions)", "bytes up and down (MB)",
    ]  # fmt: skip
    assert figure.axes[0].get_ylabel() == "held-out bits per byte"
    assert figure.axes[0].texts[0].get_text() == "6.250", "the last score stands in the picture"


@pytest.mark.parametrize("records", [[], [record(0), record(1)]])
def test_nothing_is_drawn_without_an_evaluation(tmp_path, records):
    loss_figure(records, tmp_path / "figures" / "loss.png")
    assert not list(tmp_path.iterdir())


def test_an_old_figure_is_replaced(tmp_path):
    path = tmp_path / "loss.png"
    loss_figure(RECORDS[:1], path)
    before = path.read_bytes()
    loss_figure(RECORDS, path)
    assert path.read_bytes() != before


NOTEBOOK = """
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from fedgpt.report.diagnostics import timeline_figure, updates_figure
from fedgpt.report.figures import loss_figure

pyplot.figure(7)
record = {"version": 1, "tokens": 1, "bytes_up": 1, "bytes_down": 1, "bits_per_byte": 8.0, "step_norm": 1.0}
loss_figure([record], Path("loss.png"))
updates_figure([record], Path("updates.png"))
timeline_figure([{"event": "dispatch", "seconds": 0.0, "client": "a", "task": 0}], Path("timeline.png"))
print(matplotlib.get_backend(), pyplot.get_fignums(), len(list(Path().glob("*.png"))))
"""


def test_drawing_leaves_the_backend_and_the_open_figures_of_a_notebook_alone(tmp_path):
    """In a process of its own, whose backend is none that draws PNG."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK], cwd=tmp_path, env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "svg [7] 3\n"
