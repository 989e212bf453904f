"""What a person sees while a run goes on: golden lines without a terminal, a live bar on one."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedgpt.core.options import LocalOptions, PaceOptions, RunOptions
from fedgpt.report.progress import ProgressDisplay, clock, count, size


def record(version: int, **more) -> dict:
    base = {
        "version": version,
        "tokens": 1280 * version,
        "wall_seconds": 2.0 * version,
        "train_loss": None,
    }
    return {**base, "bytes_up": 5_300_000 * version, "bytes_down": 5_310_000 * version, **more}


def scores(loss: float) -> dict:
    return {"loss": loss, "bits_per_byte": loss / 2, "perplexity": 1.0}


EVENTS = [
    ("record", record(0, **scores(8.0))),  # the evaluation thread may be ahead of the loop
    ("open", {"version": 0, "clients": [{"id": "ann", "tokens": 5}, {"id": "bob", "tokens": 7}]}),
    ("dispatch", {"client": "ann", "number": 0, "version": 0}),
    ("dispatch", {"client": "bob", "number": 0, "version": 0}),
    ("accept", {"client": "ann", "number": 0, "version": 0, "tokens": 640}),
    ("reject", {"client": "bob", "number": 0, "code": "non_finite", "detail": "NaN at 3 places"}),
    ("version", record(1)),
    ("record", record(1, train_loss=7.5)),
    ("dispatch", {"client": "bob", "number": 1, "version": 1}),
    (
        "reject",
        {"client": "bob", "number": 1, "code": "no_reply", "detail": "the version closed first"},
    ),
    ("version", record(2)),
    ("record", record(2, train_loss=7.0, **scores(7.25))),
]

GOLDEN = """\
version  0/10 | 0 tokens | held-out 8.000 = 4.000 bits/byte | up 0 B, down 0 B
  ! client bob job 0 rejected: non_finite (NaN at 3 places)
version  1/10 | 1.28k tokens | train 7.500 | up 5.3 MB, down 5.31 MB | 640 tok/s | 0:18 left
  ! client bob job 1 rejected: no_reply (the version closed first)
version  2/10 | 2.56k tokens | train 7.000 | held-out 7.250 = 3.625 bits/byte | up 10.6 MB, down 10.6 MB | 640 tok/s | \
0:16 left
"""


def shown(events, **console) -> str:
    stream = io.StringIO()
    with ProgressDisplay(
        RunOptions(rounds=10), Console(file=stream, width=60, **console)
    ) as display:
        tell(display, events)
    return stream.getvalue()


def tell(display, events) -> None:
    for event, about in events:
        display(event, about)


def silent(options: RunOptions, **more) -> ProgressDisplay:
    return ProgressDisplay(options, Console(file=io.StringIO(), width=200), **more)


def printed(display: ProgressDisplay) -> list[str]:
    return display.console.file.getvalue().splitlines()


def job(event: str, client: str, number: int = 0, **more) -> tuple[str, dict]:
    return event, {"client": client, "number": number, **more}


def test_without_a_terminal_there_is_one_plain_line_a_version():
    assert shown(EVENTS) == GOLDEN, "not wrapped at the width, no markup, no control codes"


def test_a_rejected_client_is_one_line_whatever_it_sent():
    detail = "code 2: RuntimeError: shapes\n  differ\r\n\x1b[2J[bold]0 x 3[/bold]"
    told = shown(
        [("reject", {"client": "[red]eve", "number": 4, "code": "client_error", "detail": detail})]
    )
    assert told.count("\n") == 1 and "\x1b" not in told and "\r" not in told
    assert told.startswith(
        "  ! client [red]eve job 4 rejected: client_error (code 2: RuntimeError: shapes differ "
    )
    assert "[bold]0 x 3[/bold]" in told, "markup is text"
    assert (
        shown([("reject", {"client": "eve", "number": 4, "code": "late"})])
        == "  ! client eve job 4 rejected: late\n"
    )


def test_on_a_terminal_the_lines_stay_and_the_bar_goes():
    text = shown(EVENTS, force_terminal=True)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for line in GOLDEN.splitlines():
        assert line in plain.replace("\r", "")
    assert "2/10" in plain
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor is shown again"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_terminal_is_clean_after_an_error(kind):
    stream = io.StringIO()
    display = ProgressDisplay(
        RunOptions(rounds=10), Console(file=stream, force_terminal=True, width=60)
    )
    with pytest.raises(kind), display:
        display(*EVENTS[0])
        raise kind
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    assert display._live is None
    display.say("after the end")
    assert stream.getvalue().endswith("after the end\n")


def test_the_bar_counts_clients_and_the_rate_of_this_sitting_only(monkeypatch):
    """A run resumed at version 6 of 10: tokens of earlier sittings are not this one's speed."""
    now = [100.0]
    monkeypatch.setattr("fedgpt.report.progress.time.monotonic", lambda: now[0])
    display = ProgressDisplay(RunOptions(rounds=10), Console(file=io.StringIO()))
    display("open", {"version": 6, "clients": []})
    display("record", record(6, **scores(7.0)))
    for client in "abc":
        display("dispatch", {"client": client, "number": 9, "version": 6})
    display("accept", {"client": "a", "number": 9, "version": 6, "tokens": 640})
    assert display._state() == "2 clients in flight, 1 back"
    tell(display, [job("accept", "b", 9), job("reject", "c", 9, code="no_reply")])
    now[0] += 4.0
    display("version", record(7))
    assert display._state() == "0 clients in flight, 0 back, 320 tok/s, 74.3 MB moved, 0:12 left"
    now[0] += 4.0
    display("version", record(8))
    assert "320 tok/s" in display._state() and "0:08 left" in display._state()


def test_what_is_left_of_a_resumed_run_follows_from_this_sitting():
    """Resumed at version 6 of 10: 600 s were before, version 7 took 100 s, so three more take 300
    s.
    """
    display = silent(RunOptions(rounds=10))
    tell(
        display,
        [("record", record(6, wall_seconds=600.0)), ("open", {"version": 6, "clients": []})],
    )
    display("record", record(7, wall_seconds=700.0))
    first, second = printed(display)
    assert " left" not in first, "nothing is done in this sitting: no speed is known"
    assert second.endswith("13 tok/s | 5:00 left")


def test_jobs_that_never_wait_stay_in_flight_when_a_version_is_made():
    """pace=buffer with four clients: every arrival is a version, and its client is asked again."""
    display = silent(RunOptions(pace=PaceOptions("buffer", clients=4)))
    tell(display, [("open", {"version": 0, "clients": []}), *(job("dispatch", c) for c in "abcd")])
    assert display._state() == "4 clients in flight, 0 back"
    tell(display, [job("accept", "a"), ("version", record(1)), job("dispatch", "a", 1)])
    assert display._state().startswith("4 clients in flight, 0 back")
    for number, code in enumerate(("stale", "non_finite")):
        tell(display, [job("reject", "b", number, code=code), job("dispatch", "b", number + 1)])
        # of a job that is not in flight
        display("reject", {"client": "b", "number": 0, "code": "late"})
        display("reject", {"client": "a", "number": 0, "code": "duplicate"})
        display("reject", {"client": "a", "number": 9, "code": "unknown_job"})
    assert display._state().startswith("4 clients in flight, 2 back")
    display("reject", {"client": "c", "number": 0, "code": "no_reply"})
    assert display._state().startswith("3 clients in flight, 2 back"), (
        "who is given up has not come back"
    )


def test_jobs_of_an_earlier_sitting_are_in_flight_too():
    display = silent(RunOptions(pace=PaceOptions("buffer", clients=3)))
    # before the first record
    tell(display, [("open", {"version": 6, "clients": []}), job("accept", "a", 5)])
    display("record", record(6, in_flight=3))
    assert display._state() == "2 clients in flight, 1 back"
    tell(display, [job("dispatch", "a", 6), job("accept", "b", 5)])
    assert display._state() == "2 clients in flight, 2 back"


AUTO = RunOptions(rounds=5, local=LocalOptions(steps=4, batch_size=2), pace=PaceOptions(clients=4))


def test_a_switch_of_the_pacing_is_one_line_and_followed(monkeypatch):
    """A run that may switch ends after the tokens of `rounds` rounds of four jobs of 512, however
    many versions.
    """
    now = [0.0]
    monkeypatch.setattr("fedgpt.report.progress.time.monotonic", lambda: now[0])
    display = silent(AUTO, switches=True)
    tell(
        display,
        [("open", {"version": 0, "tokens_total": 10_240}), ("record", record(0, **scores(8.0)))],
    )
    display("record", record(1, tokens=2048))
    display(
        "pacing",
        {"pacing": "buffer", "reason": "asynchrony handles 3.35 times as many", "version": 1},
    )
    for version in range(2, 12):
        display("record", record(version, tokens=2048 + 512 * version))
    display("record", record(12, tokens=8192, **scores(7.0)))
    now[0] = 24.0
    display("version", record(12, tokens=8192))
    assert display._state().endswith("0:06 left")
    display("pacing", {"pacing": "cohort", "reason": "the clients are alike", "version": 12})
    display("record", record(13, tokens=10240))
    lines = printed(display)
    assert [line.split(" | ")[0].strip() for line in lines] == [
        "version 0",
        "version 1",
        "pace=buffer from version 1 on: asynchrony handles 3.35 times as many",
        "version 12",
        "pace=cohort from version 12 on: the clients are alike",
        "version 13",
    ]
    assert "| 2.05k/10.2k tokens |" in lines[1] and lines[1].endswith("0:08 left")
    assert lines[3].endswith("0:06 left") and lines[-1].endswith("0:00 left")
    assert display._bar.numbers[0].total is None


def test_a_resumed_run_goes_on_with_the_pacing_that_it_had_come_to():
    display = silent(AUTO, switches=True, pacing="buffer")
    tell(
        display,
        [("open", {"version": 6, "tokens_total": 9}), ("record", record(6)), ("record", record(7))],
    )
    assert printed(display) == []


def test_a_run_of_so_many_tokens_counts_tokens():
    display = silent(RunOptions(rounds=3, tokens=12800))
    tell(
        display,
        [
            ("open", {"version": 0, "tokens_total": 12800}),
            ("record", record(0)),
            ("record", record(4)),
        ],
    )
    assert printed(display)[1].startswith("version 4 | 5.12k/12.8k tokens |")
    assert printed(display)[1].endswith("0:12 left")


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (7.4, "7"), (999, "999"), (999.7, "1k"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"),
     (999_999, "1M"), (1_234_567, "1.23M"), (2.5e9, "2.5G"), (3e12, "3T")],
)  # fmt: skip
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 B"), (999, "999 B"), (5_300_000, "5.3 MB"), (999_999, "1 MB"), (4.2e12, "4.2 TB")],
)
def test_sizes(value, text):
    assert size(value) == text


@given(st.floats(0, 9e14))
def test_three_figures_are_enough_and_never_an_exponent(value):
    for text in (count(value), size(value)):
        number, unit = re.fullmatch(r"([0-9.]{1,4})( ?[A-Za-z]*)", text).groups()
        assert float(number) < 1000
        scale = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit.strip().removesuffix("B")]
        assert float(number) * scale == pytest.approx(value, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (65, "1:05"),
        (3599.4, "59:59"),
        (3599.6, "1h00"),
        (7300, "2h01"),
    ],
)
def test_durations(seconds, text):
    assert clock(seconds) == text
