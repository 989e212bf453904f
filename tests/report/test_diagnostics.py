"""The pictures that explain a run: what they show is what the records say, and every word in them
can be read.
"""

from __future__ import annotations

import math

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgpt.report.diagnostics import (
    MOST_SPANS,
    MOST_STEPS,
    activity,
    timeline_figure,
    updates_figure,
)


def dispatch(seconds: float, client: str, number: int = 0) -> dict:
    return {
        "event": "dispatch",
        "seconds": seconds,
        "client": client,
        "number": number,
        "version": 0,
        "steps": 10,
    }


def accept(seconds: float, client: str, number: int = 0, tokens: int = 1000) -> dict:
    about = {"version": 0, "tokens": tokens, "staleness": 0}
    return {"event": "accept", "seconds": seconds, "client": client, "number": number, **about}


def reject(seconds: float, client: str, number: int = 0, code: str = "norm") -> dict:
    return {"event": "reject", "seconds": seconds, "code": code, "client": client, "number": number}


def version(seconds: float, number: int = 1) -> dict:
    return {"event": "version", "seconds": seconds, "version": number}


def pacing(seconds: float, name: str, reason: str) -> dict:
    return {"event": "pacing", "seconds": seconds, "pacing": name, "reason": reason}


RUN = [
    {"event": "open", "seconds": 1.0, "clients": [], "version": 0},
    *(dispatch(2.0, client) for client in ("c10", "c9", "c1")),
    accept(4.0, "c9"),
    dispatch(4.0, "c9", 1),
    reject(7.0, "c1"),
    reject(7.0, "c9", 99, "unknown_job"),
    version(8.0),
    accept(9.0, "c9", 1, tokens=500),
    accept(9.5, "c9", 1, tokens=500),  # for the second time
    {"event": "dispatch", "client": "c1", "number": 1},  # of a record that had no clock
    version(12.0, 2),
    {"event": "record", "seconds": 20.0, "version": 2},  # the last evaluation
]


def is_a_picture(path) -> bool:
    pixels = matplotlib.image.imread(path)
    return min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01


# ---- who did what


def test_what_each_client_did():
    found = activity(RUN)
    assert list(found) == ["c1", "c9", "c10"], "in the order of numbers"
    assert found["c9"].spans == ((2.0, 4.0, "accepted"), (4.0, 9.0, "accepted"))
    assert found["c1"].spans == ((2.0, 7.0, "rejected"),)
    assert found["c10"].spans == ((2.0, 12.0, "open"),), "until the last version"
    assert {c: (a.tokens, a.busy_seconds, a.accepted, a.rejected) for c, a in found.items()} == {
        "c1": (0, 5.0, 0, 1),
        "c9": (1500, 7.0, 2, 0),
        "c10": (0, 10.0, 0, 0),
    }
    assert {c: a.idle_share for c, a in found.items()} == pytest.approx(
        {"c1": 0.5, "c9": 0.3, "c10": 0.0}
    )


def test_a_job_without_a_reply_ends_where_it_is_given_up_and_its_late_reply_changes_nothing():
    events = [
        dispatch(0.0, "a"),
        reject(6.0, "a", code="no_reply"),
        reject(8.0, "a", code="late"),
        version(12.0),
    ]
    (found,) = activity(events).values()
    assert found.spans == ((0.0, 6.0, "rejected"),)
    assert (found.rejected, found.idle_share) == (1, 0.5)


def test_a_job_that_is_sent_again_after_a_restart_is_one_job():
    (found,) = activity([dispatch(0.0, "a"), dispatch(5.0, "a"), accept(8.0, "a")]).values()
    assert found.spans == ((5.0, 8.0, "accepted"),)


def test_a_job_in_the_queue_is_no_work():
    """Four clients share one worker, a second each: three quarters of the time every one of them is
    idle.
    """
    clients = "abcd"
    done = [accept(1.0 + i, client) | {"train_seconds": 1.0} for i, client in enumerate(clients)]
    found = activity([*(dispatch(0.0, client) for client in clients), *done])
    assert [did.idle_share for did in found.values()] == [0.75] * 4
    assert found["a"].spans == ((0.0, 1.0, "accepted"),)
    assert found["d"].spans == ((0.0, 3.0, "waiting"), (3.0, 4.0, "accepted"))
    assert all(did.accepted == 1 for did in found.values())


def test_a_run_without_jobs_or_without_length():
    assert activity([]) == {} == activity([version(3.0)])
    assert activity([dispatch(1.0, "a")])["a"].idle_share == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.floats(0.01, 9), st.booleans()), min_size=1, max_size=30
    )
)
def test_shares_and_counts_hold_for_any_run(jobs):
    """Every client does one job after the other."""
    events, clock, counts = [], dict.fromkeys(range(5), 0.0), dict.fromkeys(range(5), 0)
    for client, seconds, good in jobs:
        events.append(dispatch(clock[client], str(client), counts[client]))
        clock[client] += seconds
        events.append((accept if good else reject)(clock[client], str(client), counts[client]))
        counts[client] += 1
    found = activity(sorted(events, key=lambda event: event["seconds"]))
    for client, did in found.items():
        assert did.busy_seconds == pytest.approx(clock[int(client)])
        assert did.accepted + did.rejected == counts[int(client)] == len(did.spans)
        assert did.tokens == 1000 * did.accepted
        assert did.idle_share == pytest.approx(1 - clock[int(client)] / max(clock.values()))


# ---- the timeline


def test_the_timeline_shows_jobs_steps_tokens_and_idle_time(tmp_path, drawn):
    path = tmp_path / "figures" / "timeline.png"
    timeline_figure(RUN, path)
    assert is_a_picture(path)
    ((jobs, tokens, idle),) = (figure.axes for figure in drawn)
    assert [label.get_text() for label in jobs.get_yticklabels()] == ["c1", "c9", "c10"]
    assert jobs.get_ylim() == (2.5, -0.5), "the first client on top"
    assert jobs.get_title(loc="left") == "Jobs of 3 clients"
    assert jobs.get_xlabel() == "time on the run's clock (seconds)"
    bars = [
        (part.get_label(), [box.get_extents().bounds for box in part.get_paths()])
        for part in jobs.collections
    ]
    assert [(label, [(x, width) for x, _, width, _ in boxes]) for label, boxes in bars[:3]] == [
        ("update accepted", [(2, 2), (4, 5)]),
        ("rejected or no reply", [(2, 5)]),
        ("still at work at the end", [(2, 10)]),
    ]
    assert bars[3][0] == "server step" and [x for x, *_ in bars[3][1]] == [8, 12]
    assert [bar.get_width() for bar in tokens.patches] == [0, 1.5, 0]
    assert [bar.get_width() for bar in idle.patches] == pytest.approx([50, 30, 0])
    assert [text.get_text() for text in idle.texts] == ["50", "30", "0"]


def test_only_a_page_of_clients_is_shown_and_the_title_says_so(tmp_path, drawn):
    events = [
        event for i in range(40) for event in (dispatch(0.0, str(i)), accept(1.0 + i, str(i)))
    ]
    timeline_figure(sorted(events, key=lambda event: event["seconds"]), tmp_path / "x.png")
    jobs = drawn[0].axes[0]
    assert (
        jobs.get_title(loc="left")
        == "Jobs of 24 of 40 clients: the first 24 of 40 seconds (bars on the right: all)"
    )
    assert [label.get_text() for label in jobs.get_yticklabels()] == [
        f"client {i}" for i in range(24)
    ]


def test_a_long_run_is_cut_where_jobs_could_not_be_told_apart(tmp_path, drawn):
    events = [
        event
        for i in range(1200)
        for event in (dispatch(i, "a", i), accept(i + 1, "a", i), version(i + 1))
    ]
    timeline_figure(events, tmp_path / "x.png")
    jobs, tokens, _ = drawn[0].axes
    assert jobs.get_xlim() == (0, MOST_SPANS / 60), "minutes"
    assert (
        jobs.get_title(loc="left")
        == "Jobs of 1 client: the first 6.7 of 20 minutes (bars on the right: all)"
    )
    assert len(jobs.collections[0].get_paths()) == MOST_SPANS
    assert tokens.patches[0].get_width() == 1200, "of the whole run"


@pytest.mark.parametrize("count", [0, 1, MOST_STEPS, MOST_STEPS + 1])
def test_server_steps_are_drawn_while_they_can_be_told_apart(tmp_path, drawn, count):
    events = [dispatch(0.0, "a"), *(version(i + 1, i + 1) for i in range(count)), accept(99.0, "a")]
    timeline_figure(events, tmp_path / "x.png")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["update accepted"] + ["server step"] * (0 < count <= MOST_STEPS)


def test_a_switch_of_pacing_stands_above_the_first_row(tmp_path, drawn):
    switches = [
        pacing(3.0, "buffer", "idle time"),
        pacing(9.0, "cohort", "x" * 99),
        pacing(9.5, "buffer", ""),
    ]
    timeline_figure([dispatch(0.0, "a"), *switches, accept(10.0, "a")], tmp_path / "x.png")
    jobs = drawn[0].axes[0]
    words = jobs.texts
    assert [text.get_text() for text in words] == [
        "buffer: idle time",
        "cohort: " + "x" * 47 + "…",
        "buffer",
    ]
    assert [text.get_ha() for text in words] == ["left", "right", "right"], (
        "to the side where there is room"
    )
    top = jobs.get_ylim()[1]
    assert (
        all(top < text.xy[1] < -0.5 for text in words) and len({text.xy[1] for text in words}) == 3
    )
    boxes = [text.get_window_extent() for text in words]
    frame = jobs.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_names_of_clients_are_text_and_nothing_else(tmp_path, drawn):
    name = "$\\frac{1}$\n\x1b[2J a long name of a client"
    timeline_figure(
        [dispatch(0.0, name), accept(1.0, name), pacing(0.5, "buffer", "$\\x$")], tmp_path / "x.png"
    )
    (label,) = drawn[0].axes[0].get_yticklabels()
    assert label.get_text() == "$\\frac{1}$ [2J a …"


@pytest.mark.parametrize("events", [[], [version(1.0)], [{"event": "record", "version": 0}]])
def test_without_a_job_there_is_no_timeline(tmp_path, events):
    timeline_figure(events, tmp_path / "figures" / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_just_begun_can_be_drawn(tmp_path):
    timeline_figure([dispatch(0.0, "a")], tmp_path / "x.png")
    timeline_figure([dispatch(0.0, str(i)) for i in range(500)], tmp_path / "y.png")
    assert is_a_picture(tmp_path / "x.png") and is_a_picture(tmp_path / "y.png")


# ---- the updates


def record(number: int, **more) -> dict:
    about = {
        "update_norm": 2.0 / number,
        "step_norm": 1.0 / number,
        "accepted": 4,
        "staleness": {"0": 3, "2": 1},
    }
    return {"version": number, "tokens": 1000 * number, **about, **more}


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
    updates_figure([START, *(record(i + 1, **about) for i, about in enumerate(more))], path)
    assert is_a_picture(path)
    norms, angles, staleness, bases = drawn[0].axes
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [TITLES[name] for name in ("norms", "angles", "staleness", "bases")]
    assert norms.get_yscale() == "log"
    points = [(list(line.get_xdata()), list(line.get_ydata())) for line in norms.lines]
    assert points == [([1, 2], [2, 1]), ([1, 2], [1, 0.5])]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in angles.lines[1:]] == [
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
        [record(1, bases=1, staleness={"0": 4}), record(2, bases=1, staleness={})],
        tmp_path / "x.png",
    )
    titles = [axis.get_title(loc="left") for axis in drawn[0].axes]
    assert titles == [TITLES["norms"], "Staleness: every update was fresh", TITLES["accepted"]]
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
    assert is_a_picture(tmp_path / "x.png")


@pytest.mark.parametrize(
    "records", [[], [START], [START, {"version": 1}], [{"version": 1, "staleness": {}}]]
)
def test_without_versions_or_data_nothing_is_drawn(tmp_path, records):
    updates_figure(records, tmp_path / "figures" / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_long_run_gets_a_running_mean_over_a_light_line(tmp_path, drawn):
    updates_figure(
        [record(i, update_norm=3.0 + (-1) ** i) for i in range(1, 201)], tmp_path / "x.png"
    )
    raw, mean, *_ = drawn[0].axes[0].lines
    assert raw.get_alpha() == 0.3 and mean.get_alpha() is None
    assert list(raw.get_ydata())[:2] == [2, 4]
    assert len(mean.get_ydata()) == 200 and mean.get_ydata() == pytest.approx([3.0] * 200, abs=0.25)
    assert drawn[0].axes[0].get_xlabel() == "server version (bold: mean of 10)"
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()] == [
        "mean of a version's updates", "server step",
    ]  # fmt: skip
