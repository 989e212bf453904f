"""The figure of the score shows the numbers that it is given."""

from __future__ import annotations

import os
import subprocess
import sys

import matplotlib.image
import pytest

from fedgpt.report.figures import loss_figure


def line(version: int, **scores) -> dict:
    return {
        "version": version,
        "tokens": 2_000_000 * version,
        "bytes_up": 10**6,
        "bytes_down": 2 * 10**6,
        **scores,
    }


METRICS = [
    line(0, bits_per_byte=8.0),
    line(1),
    line(2, bits_per_byte=6.5),
    line(3, bits_per_byte=6.25),
]


def test_a_png_that_can_be_read_is_drawn(tmp_path):
    path = tmp_path / "figures" / "loss.png"
    loss_figure(METRICS, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert width > 2 * height > 400
    assert pixels[..., :3].std() > 0.01, "not an empty page"


def test_the_figure_shows_the_evaluated_versions_only(tmp_path, drawn):
    loss_figure(METRICS, tmp_path / "loss.png")
    (figure,) = drawn
    lines = [axis.lines[0] for axis in figure.axes]
    assert [list(line.get_xdata()) for line in lines] == [[0, 2, 3], [0, 4, 6], [3, 3, 3]]
    assert all(list(line.get_ydata()) == [8.0, 6.5, 6.25] for line in lines)
    assert [axis.get_xlabel() for axis in figure.axes] == [
        "server version",
        "tokens trained (millions)",
        "bytes up and down (MB)",
    ]
    assert figure.axes[0].get_ylabel() == "held-out bits per byte"
    assert figure.axes[0].texts[0].get_text() == "6.250", (
        "the last score is written beside its point"
    )


def test_another_task_is_drawn_by_its_own_score(tmp_path, drawn):
    metrics = [line(0, accuracy=0.25, loss=2.0), line(1), line(2, accuracy=0.75, loss=1.0)]
    loss_figure(metrics, tmp_path / "loss.png", "accuracy")
    axis = drawn[0].axes[0]
    assert list(axis.lines[0].get_ydata()) == [0.25, 0.75]
    assert axis.get_ylabel() == "held-out accuracy"


@pytest.mark.parametrize("metrics", [[], [line(0), line(1)]])
def test_no_figure_is_drawn_without_an_evaluation(tmp_path, metrics):
    loss_figure(metrics, tmp_path / "figures" / "loss.png")
    assert not list(tmp_path.iterdir())


def test_an_old_figure_is_replaced(tmp_path):
    path = tmp_path / "loss.png"
    loss_figure(METRICS[:1], path)
    before = path.read_bytes()
    loss_figure(METRICS, path)
    assert path.read_bytes() != before


NOTEBOOK = """
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from fedgpt.report.figures import loss_figure
from fedgpt.report.timeline import timeline_figure
from fedgpt.report.updates import updates_figure

pyplot.figure(7)
line = {"version": 1, "tokens": 1, "bytes_up": 1, "bytes_down": 1, "step_norm": 1.0}
loss_figure([{**line, "bits_per_byte": 8.0}], Path("loss.png"))
updates_figure([line], Path("updates.png"))
sent = {"event": "dispatch", "seconds": 0.0, "client": "a", "number": 0}
timeline_figure([sent], Path("timeline.png"))
print(matplotlib.get_backend(), pyplot.get_fignums(), len(list(Path().glob("*.png"))))
"""


def test_drawing_leaves_the_backend_and_the_open_figures_of_a_notebook_alone(tmp_path):
    """In a separate process, whose backend cannot draw PNG."""
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "svg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "svg [7] 3\n"
