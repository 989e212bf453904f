"""The figure is a picture, and of the numbers that it was given."""

from __future__ import annotations

import matplotlib.image
import pytest

from fedgpt.report.figures import loss_figure


def record(version: int, **scores) -> dict:
    return {"version": version, "tokens": 2_000_000 * version, "bytes_up": 10**6, "bytes_down": 2 * 10**6, **scores}


RECORDS = [record(0, bits_per_byte=8.0), record(1), record(2, bits_per_byte=6.5), record(3, bits_per_byte=6.25)]


def test_a_png_that_can_be_read_is_drawn(tmp_path):
    path = tmp_path / "figures" / "loss.png"
    loss_figure(RECORDS, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert width > 2 * height > 400
    assert pixels[..., :3].std() > 0.01, "not an empty page"


def test_it_shows_what_was_scored_and_nothing_else(tmp_path, monkeypatch):
    from matplotlib import pyplot

    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    loss_figure(RECORDS, tmp_path / "loss.png")
    monkeypatch.undo()
    (figure,) = kept
    lines = [axis.lines[0] for axis in figure.axes]
    pyplot.close(figure)
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


def test_figures_are_closed_and_an_old_one_is_replaced(tmp_path):
    from matplotlib import pyplot

    path = tmp_path / "loss.png"
    loss_figure(RECORDS[:1], path)
    before = path.read_bytes()
    loss_figure(RECORDS, path)
    assert path.read_bytes() != before
    assert pyplot.get_fignums() == []
