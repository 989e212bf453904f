"""The progress display: exact lines without a terminal, and a live bar on a terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedgpt.core.events import (
    Event,
    JobSent,
    MetricsReady,
    PacingChanged,
    QuarantineBegun,
    ReplyRejected,
    RunOpened,
    UpdateAccepted,
    VersionMade,
)
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import LocalOptions, PaceOptions, RunOptions
from fedgpt.report.progress import ProgressDisplay, clock, count, size


def metrics(version: int, **more) -> dict:
    base = {
        "version": version,
        "tokens": 1280 * version,
        "wall_seconds": 2.0 * version,
        "train_loss": None,
    }
    return {**base, "bytes_up": 5_300_000 * version, "bytes_down": 5_310_000 * version, **more}


def scores(loss: float) -> dict:
    return {"loss": loss, "bits_per_byte": loss / 2, "perplexity": 1.0}


def opened(version: int = 0, tokens_total: int = 0) -> RunOpened:
    return RunOpened((ClientInfo("ann", 5), ClientInfo("bob", 7)), version, tokens_total, 0.0)


def sent(client: str, number: int = 0) -> JobSent:
    return JobSent(client, number, version=0, steps=4, seconds=0.0)


def accepted(client: str, number: int = 0) -> UpdateAccepted:
    return UpdateAccepted(
        client,
        number,
        version=0,
        tokens=640,
        staleness=0,
        train_seconds=1.0,
        measured=True,
        seconds=0.0,
    )


def rejected(client: str, number: int, code: str, detail: str = "") -> ReplyRejected:
    return ReplyRejected(code, client, number, detail, seconds=0.0)


def made(version: int, **more) -> VersionMade:
    return VersionMade(metrics(version, **more), seconds=0.0)


def ready(version: int, **more) -> MetricsReady:
    return MetricsReady(metrics(version, **more))


def switched(pacing: str, reason: str, version: int) -> PacingChanged:
    return PacingChanged(pacing, reason, version, seconds=0.0)


EVENTS = [
    ready(0, **scores(8.0)),  # the first evaluation may end before the clients are known
    opened(),
    sent("ann"),
    sent("bob"),
    accepted("ann"),
    rejected("bob", 0, "non_finite", "NaN at 3 places"),
    made(1),
    ready(1, train_loss=7.5),
    sent("bob", 1),
    rejected("bob", 1, "no_reply", "the version closed first"),
    made(2),
    ready(2, train_loss=7.0, **scores(7.25)),
]

GOLDEN = """\
version  0/10 | 0 tokens | held-out 8.000 = 4.000 bits/byte | up 0 B, down 0 B
  ! client bob job 0 rejected: non_finite (NaN at 3 places)
version  1/10 | 1.28k tokens | train 7.500 | up 5.3 MB, down 5.31 MB | 640 tok/s | 0:18 left
  ! client bob job 1 rejected: no_reply (the version closed first)
version  2/10 | 2.56k tokens | train 7.000 | held-out 7.250 = 3.625 bits/byte \
| up 10.6 MB, down 10.6 MB | 640 tok/s | 0:16 left
"""


def shown(events: Sequence[Event], **console) -> str:
    stream = io.StringIO()
    with ProgressDisplay(
        RunOptions(rounds=10), Console(file=stream, width=60, **console)
    ) as display:
        deliver(display, events)
    return stream.getvalue()


def deliver(display: ProgressDisplay, events: Sequence[Event]) -> None:
    for event in events:
        display(event)


def silent(options: RunOptions, **more) -> ProgressDisplay:
    return ProgressDisplay(options, Console(file=io.StringIO(), width=200), **more)


def printed(display: ProgressDisplay) -> list[str]:
    return display.console.file.getvalue().splitlines()


def test_without_a_terminal_each_version_is_one_plain_line():
    assert shown(EVENTS) == GOLDEN, "not wrapped at the width, no markup, no control codes"


def test_a_rejected_client_is_one_line_whatever_it_sent():
    detail = "code 2: RuntimeError: shapes\n  differ\r\n\x1b[2J[bold]0 x 3[/bold]"
    line = shown([rejected("[red]eve", 4, "client_error", detail)])
    assert line.count("\n") == 1 and "\x1b" not in line and "\r" not in line
    assert line.startswith(
        "  ! client [red]eve job 4 rejected: client_error (code 2: RuntimeError: shapes differ "
    )
    assert "[bold]0 x 3[/bold]" in line, "markup is printed as text"
    assert shown([rejected("eve", 4, "late")]) == "  ! client eve job 4 rejected: late\n"


def test_events_without_a_line_of_output_are_ignored():
    assert shown([QuarantineBegun("eve", until=9, version=1, seconds=0.0)]) == ""


def test_the_score_of_another_task_is_shown():
    display = silent(RunOptions(rounds=10), score="accuracy")
    deliver(display, [ready(0, accuracy=0.25, loss=1.5), opened(), ready(1)])
    first, second = printed(display)
    assert first.startswith("version  0/10 | 0 tokens | held-out accuracy 0.250 | up 0 B")
    assert "held-out" not in second


def test_on_a_terminal_the_lines_stay_and_the_bar_is_removed():
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
        display(EVENTS[0])
        raise kind
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    assert display._live is None
    display.say("after the end")
    assert stream.getvalue().endswith("after the end\n")


def test_the_bar_shows_the_speed_of_this_process_only(monkeypatch):
    """A run resumed at version 6 of 10: tokens of the process before do not count as its speed."""
    now = [100.0]
    monkeypatch.setattr("fedgpt.report.progress.time.monotonic", lambda: now[0])
    display = ProgressDisplay(RunOptions(rounds=10), Console(file=io.StringIO()))
    deliver(display, [opened(6), ready(6, **scores(7.0)), *(sent(client, 9) for client in "abc")])
    display(accepted("a", 9))
    assert display._state() == "2 clients in flight, 1 back"
    deliver(display, [accepted("b", 9), rejected("c", 9, "no_reply")])
    now[0] += 4.0
    display(made(7))
    assert display._state() == "0 clients in flight, 0 back, 320 tok/s, 74.3 MB moved, 0:12 left"
    now[0] += 4.0
    display(made(8))
    assert "320 tok/s" in display._state() and "0:08 left" in display._state()


def test_the_time_left_of_a_resumed_run_follows_from_this_process():
    """Resumed at version 6 of 10, after 600 s: version 7 took 100 s, so three more take 300 s."""
    display = silent(RunOptions(rounds=10))
    deliver(display, [ready(6, wall_seconds=600.0), opened(6), ready(7, wall_seconds=700.0)])
    first, second = printed(display)
    assert " left" not in first, "this process has done nothing yet, so no speed is known"
    assert second.endswith("13 tok/s | 5:00 left")


def test_jobs_of_a_buffer_stay_in_flight_when_a_version_is_made():
    """pace=buffer with four clients: each update makes a version, and its client gets a new job."""
    display = silent(RunOptions(pace=PaceOptions("buffer", clients=4)))
    deliver(display, [opened(), *(sent(client) for client in "abcd")])
    assert display._state() == "4 clients in flight, 0 back"
    deliver(display, [accepted("a"), made(1), sent("a", 1)])
    assert display._state().startswith("4 clients in flight, 0 back")
    for number, code in enumerate(("stale", "non_finite")):
        deliver(display, [rejected("b", number, code), sent("b", number + 1)])
        # replies to jobs that are not in flight
        display(rejected("b", 0, "late"))
        display(rejected("a", 0, "duplicate"))
        display(rejected("a", 9, "unknown_job"))
    assert display._state().startswith("4 clients in flight, 2 back")
    display(rejected("c", 0, "no_reply"))
    assert display._state().startswith("3 clients in flight, 2 back"), "a lost job is no reply"


def test_jobs_of_an_earlier_process_are_in_flight():
    display = silent(RunOptions(pace=PaceOptions("buffer", clients=3)))
    deliver(display, [opened(6), accepted("a", 5)])  # before the first metrics
    display(ready(6, in_flight=3))
    assert display._state() == "2 clients in flight, 1 back"
    deliver(display, [sent("a", 6), accepted("b", 5)])
    assert display._state() == "2 clients in flight, 2 back"


AUTO = RunOptions(rounds=5, local=LocalOptions(steps=4, batch_size=2), pace=PaceOptions(clients=4))


def test_a_change_of_the_pacing_is_one_line_and_changes_the_display(monkeypatch):
    """Such a run ends after the tokens of `rounds` rounds, however many versions that takes."""
    now = [0.0]
    monkeypatch.setattr("fedgpt.report.progress.time.monotonic", lambda: now[0])
    display = silent(AUTO, switches=True)
    deliver(display, [opened(0, tokens_total=10_240), ready(0, **scores(8.0))])
    display(ready(1, tokens=2048))
    display(switched("buffer", "asynchrony handles 3.35 times as many", 1))
    for version in range(2, 12):
        display(ready(version, tokens=2048 + 512 * version))
    display(ready(12, tokens=8192, **scores(7.0)))
    now[0] = 24.0
    display(made(12, tokens=8192))
    assert display._state().endswith("0:06 left")
    display(switched("cohort", "the clients are alike", 12))
    display(ready(13, tokens=10240))
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
    assert display._bar.tasks[0].total is None


def test_a_resumed_run_continues_with_the_changed_pacing():
    display = silent(AUTO, switches=True, pacing="buffer")
    deliver(display, [opened(6, tokens_total=9), ready(6), ready(7)])
    assert printed(display) == []


def test_a_run_with_a_number_of_tokens_counts_tokens():
    display = silent(RunOptions(rounds=3, tokens=12800))
    deliver(display, [opened(0, tokens_total=12800), ready(0), ready(4)])
    assert printed(display)[1].startswith("version 4 | 5.12k/12.8k tokens |")
    assert printed(display)[1].endswith("0:12 left")


COUNTS = {
    0: "0",
    7.4: "7",
    999: "999",
    999.7: "1k",
    1000: "1k",
    1234: "1.23k",
    999_499: "999k",
    999_999: "1M",
    1_234_567: "1.23M",
    2.5e9: "2.5G",
    3e12: "3T",
}


@pytest.mark.parametrize("value, text", COUNTS.items())
def test_counts(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(0, "0 B"), (999, "999 B"), (5_300_000, "5.3 MB"), (999_999, "1 MB"), (4.2e12, "4.2 TB")],
)
def test_sizes(value, text):
    assert size(value) == text


@given(st.floats(0, 9e14))
def test_numbers_have_three_digits_and_no_exponent(value):
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
