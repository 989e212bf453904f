"""The timeline shows the jobs of events.jsonl, and all text in it can be read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pictures import is_picture

from fedgpt.report.timeline import MOST_SPANS, MOST_STEPS, activity, timeline_figure


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
    accept(9.5, "c9", 1, tokens=500),  # a duplicate
    {"event": "dispatch", "client": "c1", "number": 1},  # an event without a time
    version(12.0, 2),
    {"event": "metrics", "seconds": 20.0, "version": 2},  # the last evaluation
]


# ---- activity of clients


def test_the_activity_of_each_client():
    found = activity(RUN)
    assert list(found) == ["c1", "c9", "c10"], "sorted by number"
    assert found["c9"].spans == ((2.0, 4.0, "accepted"), (4.0, 9.0, "accepted"))
    assert found["c1"].spans == ((2.0, 7.0, "rejected"),)
    assert found["c10"].spans == ((2.0, 12.0, "open"),), "up to the last version"
    assert {c: (a.tokens, a.busy_seconds, a.accepted, a.rejected) for c, a in found.items()} == {
        "c1": (0, 5.0, 0, 1),
        "c9": (1500, 7.0, 2, 0),
        "c10": (0, 10.0, 0, 0),
    }
    assert {c: a.idle_share for c, a in found.items()} == pytest.approx(
        {"c1": 0.5, "c9": 0.3, "c10": 0.0}
    )


def test_a_job_without_a_reply_ends_when_it_is_given_up_and_a_late_reply_changes_nothing():
    events = [
        dispatch(0.0, "a"),
        reject(6.0, "a", code="no_reply"),
        reject(8.0, "a", code="late"),
        version(12.0),
    ]
    (found,) = activity(events).values()
    assert found.spans == ((0.0, 6.0, "rejected"),)
    assert (found.rejected, found.idle_share) == (1, 0.5)


def test_a_job_that_is_sent_again_after_a_restart_counts_once():
    (found,) = activity([dispatch(0.0, "a"), dispatch(5.0, "a"), accept(8.0, "a")]).values()
    assert found.spans == ((5.0, 8.0, "accepted"),)


def test_waiting_for_a_worker_counts_as_idle_time():
    """Four clients share one worker, one second each, so each is idle for three of four seconds."""
    clients = "abcd"
    done = [accept(1.0 + i, client) | {"train_seconds": 1.0} for i, client in enumerate(clients)]
    found = activity([*(dispatch(0.0, client) for client in clients), *done])
    assert [did.idle_share for did in found.values()] == [0.75] * 4
    assert found["a"].spans == ((0.0, 1.0, "accepted"),)
    assert found["d"].spans == ((0.0, 3.0, "waiting"), (3.0, 4.0, "accepted"))
    assert all(did.accepted == 1 for did in found.values())


def test_events_of_older_runs_are_read():
    """They have `task` for the number of a job."""
    older = [
        {("task" if name == "number" else name): value for name, value in event.items()}
        for event in RUN
    ]
    assert older != RUN and activity(older) == activity(RUN)


def test_the_activity_of_a_run_without_jobs_or_without_length():
    assert activity([]) == {} == activity([version(3.0)])
    assert activity([dispatch(1.0, "a")])["a"].idle_share == 0.0


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.floats(0.01, 9), st.booleans()), min_size=1, max_size=30
    )
)
def test_shares_and_counts_are_right_for_any_run(jobs):
    """Each client does one job after another."""
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
    assert is_picture(path)
    ((jobs, tokens, idle),) = (figure.axes for figure in drawn)
    assert [label.get_text() for label in jobs.get_yticklabels()] == ["c1", "c9", "c10"]
    assert jobs.get_ylim() == (2.5, -0.5), "the first client is at the top"
    assert jobs.get_title(loc="left") == "Jobs of 3 clients"
    assert jobs.get_xlabel() == "time on the run's clock (seconds)"
    bars = [
        (part.get_label(), [box.get_extents().bounds for box in part.get_paths()])
        for part in jobs.collections
    ]
    assert [(label, [(x, width) for x, _, width, _ in boxes]) for label, boxes in bars[:3]] == [
        ("update accepted", [(2, 2), (4, 5)]),
        ("rejected or no reply", [(2, 5)]),
        ("in flight at the end", [(2, 10)]),
    ]
    assert bars[3][0] == "server step" and [x for x, *_ in bars[3][1]] == [8, 12]
    assert [bar.get_width() for bar in tokens.patches] == [0, 1.5, 0]
    assert [bar.get_width() for bar in idle.patches] == pytest.approx([50, 30, 0])
    assert [text.get_text() for text in idle.texts] == ["50", "30", "0"]


def test_only_the_first_clients_are_shown_and_the_title_says_so(tmp_path, drawn):
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


def test_only_the_start_of_a_long_run_is_shown(tmp_path, drawn):
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
    assert tokens.patches[0].get_width() == 1200, "of the complete run"


@pytest.mark.parametrize("count", [0, 1, MOST_STEPS, MOST_STEPS + 1])
def test_server_steps_are_drawn_if_they_are_few(tmp_path, drawn, count):
    events = [dispatch(0.0, "a"), *(version(i + 1, i + 1) for i in range(count)), accept(99.0, "a")]
    timeline_figure(events, tmp_path / "x.png")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["update accepted"] + ["server step"] * (0 < count <= MOST_STEPS)


def test_a_change_of_the_pacing_is_written_above_the_first_row(tmp_path, drawn):
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
        "on the side that has room"
    )
    top = jobs.get_ylim()[1]
    assert (
        all(top < text.xy[1] < -0.5 for text in words) and len({text.xy[1] for text in words}) == 3
    )
    boxes = [text.get_window_extent() for text in words]
    frame = jobs.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_names_of_clients_are_shown_as_plain_text(tmp_path, drawn):
    name = "$\\frac{1}$\n\x1b[2J a long name of a client"
    timeline_figure(
        [dispatch(0.0, name), accept(1.0, name), pacing(0.5, "buffer", "$\\x$")], tmp_path / "x.png"
    )
    (label,) = drawn[0].axes[0].get_yticklabels()
    assert label.get_text() == "$\\frac{1}$ [2J a …"


@pytest.mark.parametrize("events", [[], [version(1.0)], [{"event": "metrics", "version": 0}]])
def test_no_timeline_is_drawn_without_a_job(tmp_path, events):
    timeline_figure(events, tmp_path / "figures" / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_run_that_has_just_begun_can_be_drawn(tmp_path):
    timeline_figure([dispatch(0.0, "a")], tmp_path / "x.png")
    timeline_figure([dispatch(0.0, str(i)) for i in range(500)], tmp_path / "y.png")
    assert is_picture(tmp_path / "x.png") and is_picture(tmp_path / "y.png")
