"""Trackers: each version once even after kills, only published fields, no failure of a run."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.core.events import (
    Event,
    JobSent,
    MetricsReady,
    Observer,
    PacingChanged,
    QuarantineBegun,
    QuarantineEnded,
    ReplyRejected,
    RunOpened,
    UpdateAccepted,
    VersionMade,
)
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import PrivacyOptions, RunOptions
from fedgpt.report.published import PUBLISHED
from fedgpt.report.trackers import MEMBERS, make_trackers
from fedgpt.report.trackers.base import Tracker, flat
from fedgpt.server.observers import THREAD, Observers

# A third-party tracker, outside the package. It cannot delete lines that it has written.
CHART = """
import json
from dataclasses import dataclass

from fedgpt.core.events import MetricsReady
from fedgpt.report.trackers.base import Tracker


@dataclass
class Chart(Tracker):
    color: str = "blue"

    def open(self, run):
        self.path = run.folder / "chart.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return json.loads(lines[-1])["version"] if lines else -1

    def __call__(self, event):
        if isinstance(event, MetricsReady):
            with self.path.open("a") as stream:
                stream.write(json.dumps({**event.metrics, "color": self.color}) + "\\n")
"""
THIRD_PARTY = {"_target_": "mine.Chart", "color": "red"}


@pytest.fixture(autouse=True)
def outside(tmp_path_factory, monkeypatch):
    """A folder outside the repository with a package that a user wrote."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mine.py").write_text(CHART)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("mine", None)


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_chart(folder: Path) -> list[dict[str, str]]:
    """Rows as text, as read_csv has them."""
    lines = [json.loads(line) for line in (folder / "chart.jsonl").read_text().splitlines()]
    assert all(line.pop("color") == "red" for line in lines)
    return [text_of(flat(line)) for line in lines]


def text_of(values: Mapping) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in values.items()}


# every tracker with a function that reads back what it has written
READERS = {"csv": ("csv", read_csv), "third party": (THIRD_PARTY, read_chart)}
every_tracker = pytest.mark.parametrize("name", READERS)


def options(*nodes, unit: str = "none") -> RunOptions:
    return RunOptions(
        track=list(nodes), trusted_packages=["mine"], privacy=PrivacyOptions(unit=unit)
    )


def metrics(version: int) -> dict:
    """A line of metrics.jsonl as server/metrics_line.py has it; each second version has scores."""
    line = {
        "version": version,
        "tokens": 100 * version,
        "wall_seconds": 1.5 * version,
        "virtual_seconds": None,
        "bytes_up": 1000 * version,
        "bytes_down": 1001 * version,
        "accepted": 3,
        "rejected": {"late": 2, "norm_limit": 1},
        "staleness": {"0": 2, "3": 1},
        "train_loss": 5.25 if version else None,
        "lr": 0.003,
        "update_norm": 0.1 * version,
        "step_norm": 0.05 * version,
        "cosine": None,
        "pacing": "cohort" if version else None,
        "in_flight": 2,
        "tokens_by_client": {"ann": 40, "bob": 60},
        "idle_share": {"ann": 0.5, "bob": 0.25},
        "epsilon": 0.5 * version,
        "privacy_clip": 0.125,
    }
    if version % 2:
        return line
    scores = {"loss": 8 - version / 8, "perplexity": 20.0, "bits_per_byte": 1 / 3}
    return {**line, **scores, "prompt": "Fellow", "sample": ' "citizens", =1+1\nof'}


def row(version: int) -> dict[str, str]:
    """A version's row in a table, whose columns are those of version 0."""
    values = flat(metrics(version))
    return text_of({name: values.get(name) for name in flat(metrics(0))})


def events_of(version: int) -> list[Event]:
    """The events of one version, its scores last."""
    opened = RunOpened((ClientInfo("ann", 40), ClientInfo("bob", 60)), version, 1000, 0.5)
    first = [opened] if version == 0 else []
    return [
        *first,
        JobSent("ann", version, version, 4, 0.5),
        UpdateAccepted("ann", version, version, 40, 0, 1.0, True, 1.5),
        ReplyRejected("late", "bob", version, "too late", 1.5),
        QuarantineBegun("bob", version + 1, version, 1.5),
        QuarantineEnded("bob", version, 1.5),
        PacingChanged("buffer", "stragglers", version, 1.5),
        VersionMade({**metrics(version)}, 1.5),
        MetricsReady(metrics(version)),
    ]


def script(versions: Sequence[int]) -> list[Event]:
    return [event for version in versions for event in events_of(version)]


def finish(tracker: Observer, events: Sequence[Event]) -> None:
    deliver([tracker], events)


def deliver(trackers: Sequence[Observer], events: Sequence[Event]) -> None:
    """As a run does it: from the delivery thread, to its end."""
    observers = Observers(trackers)
    for event in events:
        observers.publish(event)
    observers.close()


def write_metrics(folder: Path, versions: Sequence[int]) -> None:
    lines = [json.dumps(metrics(version)) + "\n" for version in versions]
    (folder / "metrics.jsonl").write_text("".join(lines))


def known(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows without the columns that version 0 does not have."""
    return [{name: line.get(name, "") for name in row(0)} for line in rows]


def test_every_tracker_is_tested():
    assert set(MEMBERS.names()) == READERS.keys() - {"third party"}


# ---- every version once


@every_tracker
def test_each_version_is_kept_once_with_its_values(tmp_path, name):
    node, read = READERS[name]
    (tracker,) = make_trackers(options(node), tmp_path, 0)
    finish(tracker, script(range(5)))
    assert known(read(tmp_path)) == [row(version) for version in range(5)]


@every_tracker
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_version_is_lost_or_doubled_over_kills_and_resumes(tmp_path_factory, name, data):
    """Each process is killed after some events, and the next one continues from a checkpoint."""
    node, read = READERS[name]
    folder = tmp_path_factory.mktemp("run")
    rounds, start = 8, 0
    for _ in range(data.draw(st.integers(0, 3), label="kills")):
        write_metrics(folder, range(start))
        made = data.draw(st.integers(start, rounds), label="versions in metrics.jsonl")
        events = script(range(start, made + 1))
        delivered = data.draw(st.integers(0, len(events)), label="events delivered")
        (tracker,) = make_trackers(options(node), folder, start)
        # a killed process does not close it, but the kernel closes its files
        finish(tracker, events[:delivered])
        if name == "csv" and (table := folder / "metrics.csv").exists():
            size = table.stat().st_size
            os.truncate(table, size - data.draw(st.integers(0, size), label="bytes lost"))
        start = data.draw(st.integers(start, made), label="resumed at")
    write_metrics(folder, range(start))
    (tracker,) = make_trackers(options(node), folder, start)
    finish(tracker, script(range(start, rounds + 1)))
    assert known(read(folder)) == [row(version) for version in range(rounds + 1)]
    shutil.rmtree(folder)


@every_tracker
def test_a_tracker_whose_file_was_deleted_gets_every_version_again(tmp_path, name):
    node, read = READERS[name]
    write_metrics(tmp_path, range(4))
    (tracker,) = make_trackers(options(node), tmp_path, 4)
    finish(tracker, script([4]))
    assert known(read(tmp_path)) == [row(version) for version in range(5)]


def test_nothing_is_written_before_the_first_event(tmp_path):
    deliver(make_trackers(options("csv", THIRD_PARTY), tmp_path, 0), [])
    assert not list(tmp_path.iterdir()), "a run that is refused leaves nothing behind"


def test_a_tracker_is_opened_with_a_description_of_its_run(tmp_path):
    opened = []

    class Curious(Tracker):
        def open(self, run):
            opened.append(run)
            return super().open(run)

        def __call__(self, event):
            opened.append(event)

    sys.modules["mine"] = type(sys)("mine")
    sys.modules["mine"].Curious = Curious
    o = options({"_target_": "mine.Curious"})
    write_metrics(tmp_path, range(3))
    (tracker,) = make_trackers(o, tmp_path, 3)
    finish(tracker, script([3])[-1:])
    run, event = opened
    assert (run.name, run.folder, run.resumed_at) == ("run", tmp_path, 3)
    assert run.options["pace.clients"] == o.pace.clients and run.options["seed"] == 0
    assert event.metrics["version"] == 3, "the earlier versions are not sent again"


# ---- privacy=client

SCORES = ("loss", "perplexity", "bits_per_byte")


@every_tracker
def test_a_run_with_privacy_by_client_shows_published_fields_only(tmp_path, name):
    """Also those of lines that a resumed run reads from metrics.jsonl."""
    node, read = READERS[name]
    write_metrics(tmp_path, range(2))
    (tracker,) = make_trackers(options(node, unit="client"), tmp_path, 2)
    finish(tracker, script(range(2, 5)))
    rows = read(tmp_path)
    assert [int(line["version"]) for line in rows] == [0, 1, 2, 3, 4]
    assert all(line.keys() <= {*PUBLISHED, *SCORES} for line in rows)
    assert {"tokens", "epsilon", "loss"} <= rows[0].keys()


def test_with_privacy_by_client_other_events_are_not_passed_on(tmp_path):
    seen = []

    class Spy(Tracker):
        def __call__(self, event):
            seen.append(event)

    sys.modules["mine"] = type(sys)("mine")
    sys.modules["mine"].Spy = Spy
    (tracker,) = make_trackers(options({"_target_": "mine.Spy"}, unit="client"), tmp_path, 0)
    finish(tracker, script(range(2)))
    opened, *lines = seen
    assert opened == RunOpened((), 0, 1000, 0.0), "neither the clients nor their times are shown"
    assert [type(event) for event in lines] == [MetricsReady] * 2


def test_scores_of_another_task_are_shown_if_they_are_named(tmp_path):
    line = {**metrics(0), "accuracy": 0.75}
    for scores, expected in ((("accuracy",), {"accuracy"}), ((), set())):
        (tracker,) = make_trackers(options("csv", unit="client"), tmp_path, 0, scores)
        finish(tracker, [MetricsReady(line)])
        (found,) = read_csv(tmp_path)
        assert found.keys() - set(PUBLISHED) == expected


# ---- failures


def test_a_failing_tracker_is_reported_once_and_the_run_continues(tmp_path, caplog):
    (tmp_path / "metrics.csv").mkdir()  # so it cannot be written
    deliver(make_trackers(options("csv", THIRD_PARTY), tmp_path, 0), script(range(4)))
    assert known(read_chart(tmp_path)) == [row(version) for version in range(4)]
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert warning.startswith("track=csv: stopped after an error (IsADirectoryError: ")
    assert "the run continues without it" in warning


@pytest.mark.parametrize("method", ["open", "__call__", "close", "none"])
def test_no_method_can_end_a_run_and_one_thread_calls_them_all(tmp_path, caplog, method):
    calls, threads = [], set()

    def body(name):
        def called(self, *arguments):
            calls.append(name)
            threads.add(threading.current_thread().name)
            if name == method:
                raise RuntimeError("no network")
            return -1

        return called

    names = ("open", "__call__", "close")
    sys.modules["mine"] = type(sys)("mine")
    sys.modules["mine"].Broken = type("Broken", (Tracker,), {name: body(name) for name in names})
    (tracker,) = make_trackers(options({"_target_": "mine.Broken"}), tmp_path, 0)
    with caplog.at_level(logging.WARNING):
        finish(tracker, script(range(2)))
    assert threads == {THREAD}
    assert calls[0] == "open" and calls[-1] == "close" and calls.count("close") == 1
    if method == "none":
        assert not caplog.records
    else:
        (warning,) = [entry.getMessage() for entry in caplog.records]
        assert warning.startswith("track=mine.Broken: stopped after an error (RuntimeError: no n")
        assert calls.count(method) == 1, "nothing but close comes after an error"


# ---- the option


@pytest.mark.parametrize(
    "typed, problems",
    [
        ("track=[cvs]", ["track=[cvs]: allowed are csv, or {_target_:package.module.Class}; did"]),
        ("track=[7]", ["track=[7]: allowed are csv, or"]),
        ("track=[csv,csv]", ["track=csv: stands twice in the list; leave one out"]),
        (
            "track=[a,{_target_:os.path.PurePath}]",
            [
                "track=[a]: allowed",
                "track._target_=os.path.PurePath: only classes in fedgpt.report.trackers are used",
            ],
        ),
        (
            "track=[{_target_:fedgpt.report.trackers.csv.CsvTracker,fil:x}]",
            ["track.fil=x: the options of CsvTracker are file; did you mean 'file'?"],
        ),
        (
            "track=[{_target_:fedgpt.report.trackers.csv.CsvTracker,file:a/b}]",
            ["track: CsvTracker refused its options: file=a/b: must be the name of a file"],
        ),
        (
            "track=[{_target_:fedgpt.report.trackers.base.TrackedRun}]",
            ["track._target_=fedgpt.report.trackers.base.TrackedRun: must inherit from"],
        ),
    ],
)
def test_wrong_trackers_are_refused_all_at_once(tmp_path, typed, problems):
    with pytest.raises(ConfigError) as refused:
        make_trackers(compose.load([typed]), tmp_path, 0)
    found = refused.value.problems
    assert len(found) == len(problems)
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start)


def test_trackers_are_typed_as_a_list_and_kept_in_config_yaml(tmp_path):
    typed = ["track=[csv,{_target_:mine.Chart,color:red}]", "trusted_packages=[mine]"]
    o = compose.from_yaml(compose.to_yaml(compose.load(typed)))
    assert o.track == ["csv", THIRD_PARTY]
    for tracker in make_trackers(o, tmp_path, 0):
        finish(tracker, script(range(2)))
    assert known(read_csv(tmp_path)) == known(read_chart(tmp_path)) == [row(0), row(1)]


def test_a_run_may_be_resumed_with_other_trackers():
    assert "track" not in compose.flat_options(compose.load(["track=[csv]"]))


# ---- metrics.csv


def test_two_tables_can_be_written_under_two_names(tmp_path):
    other = {"_target_": "fedgpt.report.trackers.csv.CsvTracker", "file": "other.csv"}
    for tracker in make_trackers(options("csv", other), tmp_path, 0):
        finish(tracker, script(range(3)))
    assert (tmp_path / "metrics.csv").read_bytes() == (tmp_path / "other.csv").read_bytes()


def test_the_table_has_a_head_and_a_line_for_each_version(tmp_path):
    (tracker,) = make_trackers(options("csv"), tmp_path, 0)
    finish(tracker, script(range(2)))
    head, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert head.startswith("version,tokens,wall_seconds,") and head.endswith(",bits_per_byte")
    assert [line.split(",")[:3] for line in lines] == [["0", "0", "0.0"], ["1", "100", "1.5"]]
    assert "citizens" not in head + "".join(lines), "texts are in samples.md"
