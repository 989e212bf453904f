"""The records of a resumed run: which damage of them is refused, and which of them are kept."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from support.advice import advises
from support.fake_transport import honest
from support.harness import options, run

from fedgpt.core.errors import FedGPTError, resume_command
from fedgpt.core.faults import Injected, injected
from fedgpt.core.options import CheckpointOptions, RunOptions

CLIENTS = dict.fromkeys("ab", honest)


def four_rounds(folder: Path, every: int = 1) -> RunOptions:
    o = options(folder, rounds=4)
    o.checkpoint = CheckpointOptions(every=every)
    return o


def failed(o: RunOptions) -> RunOptions:
    """A run that failed in its fourth round."""
    with injected("aggregate:4:raise"), pytest.raises(Injected):
        run(o, CLIENTS)
    return o


@pytest.fixture
def stopped(tmp_path) -> RunOptions:
    """A run that failed after the checkpoint of version 3."""
    return failed(four_rounds(tmp_path / "run"))


def changed(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[line - 1], lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new, 1)
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    ("file", "line", "old", "new", "problem"),
    [
        ("metrics.jsonl", 2, '"tokens"', '"tokeos"', "it has no 'tokens'"),
        ("metrics.jsonl", 2, '"version": 1', '"version": null', "it has no 'version'"),
        ("metrics.jsonl", 3, '"version": 2', '"version": "2"', "'version' is '2'"),
        ("metrics.jsonl", 2, '"staleness": {"0"', '"staleness": {" "', "'staleness' is {' ': 2}"),
        ("metrics.jsonl", 2, '"step_norm": ', '"step_norm": "x", "": ', "'step_norm' is 'x'"),
        ("events.jsonl", 1, '"seconds"', '"secones"', "it has no 'seconds'"),
        ("events.jsonl", 1, '"client": "a"', '"client": ["a"]', "'client' is ['a']"),
        ("events.jsonl", 3, '"tokens"', '"tokeos"', "it has no 'tokens'"),
    ],
)
def test_a_damaged_record_is_refused_by_name(stopped, file, line, old, new, problem):
    path = Path(stopped.run_dir) / file
    changed(path, line, old, new)
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    with pytest.raises(FedGPTError) as refused:
        run(stopped, CLIENTS)
    assert f"{path}: line {line} is damaged ({problem}); delete that line" in str(refused.value)
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before


def refusal(o: RunOptions) -> str:
    """Why a run is refused; afterwards nothing holds the lock of its folder."""
    with pytest.raises(FedGPTError) as refused:
        run(o, CLIENTS)
    message = str(refused.value)
    del refused
    gc.collect()
    return message


@pytest.mark.parametrize(
    "file, part",
    [
        *[("metrics.jsonl", part) for part in ("all", "before version 3", "from version 3 on")],
        *[("events.jsonl", part) for part in ("all", "from version 3 on")],
    ],
)
def test_records_of_another_run_are_refused_before_anything_is_written(
    stopped, tmp_path, file, part
):
    """The summary and the figures would be made from them."""
    path = Path(stopped.run_dir) / file
    other = four_rounds(tmp_path / "other")
    run(other, dict.fromkeys("abc", honest))
    own, lines = path.read_text(), (tmp_path / "other" / file).read_text().splitlines(True)
    third = next(i for i, line in enumerate(lines) if json.loads(line).get("version") == 3)
    parts = {"all": lines, "before version 3": lines[:third], "from version 3 on": lines[third:]}
    path.write_text("".join(parts[part]))
    before = {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()}
    message = refusal(stopped)
    assert f"{path} is not that of this run: '" in message
    assert {p: p.read_bytes() for p in path.parent.rglob("*") if p.is_file()} == before
    command = resume_command(path.parent)
    advises(message, f"; put the file of this run back, and continue with: {command}")
    path.write_text(own)
    assert run(stopped, CLIENTS).summary["versions"] == 4


def untimed(path: Path) -> list[dict]:
    return [json.loads(line) | {"wall_seconds": 0} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("every", [1, 2, 0], ids=["newest", "an earlier one", "none"])
def test_after_a_resume_from_a_checkpoint_every_record_is_there_once(tmp_path, every):
    whole = four_rounds(tmp_path / "whole", every)
    run(whole, CLIENTS)
    again = failed(four_rounds(tmp_path / "again", every))
    run(again, CLIENTS)
    for file in ("metrics.jsonl", "events.jsonl"):
        assert untimed(Path(again.run_dir) / file) == untimed(Path(whole.run_dir) / file)


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_events_are_kept_though_that_of_the_newest_version_is_damaged(stopped, tmp_path, how):
    """Those before the damage, and after a deleted line also those of the next jobs."""
    whole = four_rounds(tmp_path / "whole")
    run(whole, CLIENTS)
    expected = untimed(Path(whole.run_dir) / "events.jsonl")
    at = next(i for i, e in enumerate(expected) if (e["event"], e.get("version")) == ("version", 3))
    path = Path(stopped.run_dir) / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    end = lines[at + 1 :] if how == "deleted" else [lines[at][:20] + "\n", *lines[at + 1 :]]
    path.write_text("".join([*lines[:at], *end]))
    run(stopped, CLIENTS)
    assert untimed(path) == [*expected[:at], *expected[at + 1 :]]
