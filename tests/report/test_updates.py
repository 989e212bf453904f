"""The figure of updates shows the numbers of metrics.jsonl."""

from __future__ import annotations

import math

import pytest
from support.pictures import is_picture

from fedgpt.report.updates import updates_figure


def line(version: int, **more) -> dict:
    about = {
        "update_norm": 2.0 / version,
        "step_norm": 1.0 / version,
        "accepted": 4,
        "staleness": {"0": 3, "2": 1},
    }
    return {"version": version, "tokens": 1000 * version, **about, **more}


START = {"version": 0, "tokens": 0, "loss": 8.0}
TITLES = {
    "norms": "Length of updates and server steps",
    "angles": "Agreement: 1 same direction, 0 unrelated",
    "staleness": "Staleness: mean 0.50, largest 2",
    "bases": "Models that jobs in flight started from",
    "accepted": "Updates in a server step",
}


def test_the_updates_of_an_asynchronous_run(tmp_path, drawn):
    path = tmp_path / "figures" / "updates.png"
    more = [
        {"cosine": 0.2, "step_correlation": None, "bases": 1},
        {"cosine": None, "step_correlation": -0.1, "bases": 3},
    ]
    updates_figure([START, *(line(i + 1, **about) for i, about in enumerate(more))], path)
    assert is_picture(path)
    norms, angles, staleness, bases = drawn[0].axes
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [TITLES[name] for name in ("norms", "angles", "staleness", "bases")]
    assert norms.get_yscale() == "log"
    points = [(list(curve.get_xdata()), list(curve.get_ydata())) for curve in norms.lines]
    assert points == [([1, 2], [2, 1]), ([1, 2], [1, 0.5])]
    assert [(list(curve.get_xdata()), list(curve.get_ydata())) for curve in angles.lines[1:]] == [
        ([1], [0.2]),
        ([2], [-0.1]),
    ]
    assert {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in staleness.patches} == {
        0: 75,
        2: 25,
    }
    assert list(bases.lines[0].get_ydata()) == [1, 3]


def test_a_synchronous_run_shows_how_many_updates_a_step_had(tmp_path, drawn):
    updates_figure(
        [line(1, bases=1, staleness={"0": 4}), line(2, bases=1, staleness={})],
        tmp_path / "x.png",
    )
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [TITLES["norms"], "Staleness: 0 for every update", TITLES["accepted"]]
    assert list(drawn[0].axes[2].lines[0].get_ydata()) == [4, 4]


@pytest.mark.parametrize(
    "about, titles",
    [
        ({"step_norm": 0.5}, ["norms"]),
        ({"step_norm": 0.0, "update_norm": None, "accepted": 0}, ["accepted"]),
        ({"update_norm": math.nan, "cosine": 0.5}, ["angles"]),
        ({"bases": 1}, ["bases"]),
        ({"staleness": {"0": 3, "2": 1}, "step_correlation": 0.0}, ["angles", "staleness"]),
    ],
)
def test_panels_without_data_are_left_out(tmp_path, drawn, about, titles):
    updates_figure([START, {"version": 1, **about}], tmp_path / "x.png")
    assert [axis.get_title(loc="left") for axis in drawn[0].axes] == [
        TITLES[name] for name in titles
    ]
    assert is_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    "metrics", [[], [START], [START, {"version": 1}], [{"version": 1, "staleness": {}}]]
)
def test_without_versions_or_data_nothing_is_drawn(tmp_path, metrics):
    updates_figure(metrics, tmp_path / "figures" / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_long_run_gets_a_running_mean_over_a_light_line(tmp_path, drawn):
    updates_figure(
        [line(i, update_norm=3.0 + (-1) ** i) for i in range(1, 201)], tmp_path / "x.png"
    )
    raw, mean, *_ = drawn[0].axes[0].lines
    assert raw.get_alpha() == 0.3 and mean.get_alpha() is None
    assert list(raw.get_ydata())[:2] == [2, 4]
    assert len(mean.get_ydata()) == 200 and mean.get_ydata() == pytest.approx([3.0] * 200, abs=0.25)
    assert drawn[0].axes[0].get_xlabel() == "server version (bold: mean of 10)"
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [
        "mean of a version's updates",
        "server step",
    ]
