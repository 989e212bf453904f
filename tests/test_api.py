"""The Python interface: how a Run describes the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.advice import advises

from fedgpt import open_run
from fedgpt.core.errors import ConfigError, FedGPTError


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    return tmp_path


def write(folder: Path, lines: list[dict], summary: dict | None = None) -> str:
    """The representation of a run with these files."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return repr(open_run(folder))


START = {"version": 0, "loss": 8.0, "bits_per_byte": 2.9}
NEWEST = {"version": 3, "tokens": 30}


def test_repr_shows_folder_state_and_newest_score(folder):
    assert repr(open_run(folder)) == f"<Run {folder}: no version yet>"
    assert write(folder, [NEWEST]) == f"<Run {folder}: at version 3>"
    lines = [START, NEWEST]
    assert write(folder, lines) == f"<Run {folder}: at version 3, 2.900 bits per byte>"
    finished = f"<Run {folder}: finished at version 3, 2.900 bits per byte>"
    assert write(folder, lines, {"versions": 3}) == finished


def test_repr_of_another_task_shows_its_score(folder):
    lines = [{"version": 0, "accuracy": 0.25}, {"version": 1, "accuracy": 0.75}]
    summary = {"versions": 1, "score": "accuracy"}
    assert write(folder, lines, summary).endswith(": finished at version 1, accuracy 0.750>")


def test_a_damaged_summary_does_not_hide_a_run(folder):
    (folder / "summary.json").write_text("{")
    assert write(folder, [NEWEST]) == f"<Run {folder}: at version 3>"


def test_a_run_that_is_not_finished_has_no_summary(folder):
    with pytest.raises(FedGPTError, match="has no summary yet; finish it with: fedgpt run resume="):
        _ = open_run(folder).summary
    assert open_run(folder).metrics == []


@pytest.mark.parametrize(
    ("left", "has"),
    [([0, 1, 2], ""), ([0, 2], "2 of the 3"), ([0, 1], "2 of the 3"), ([], "0 of the 3")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_versions_that_have_no_line_any_more_are_counted(folder, caplog, left, has, finished):
    """A run that has not finished cannot tell of versions after its newest line."""
    lines = [{"version": version} for version in left]
    write(folder, lines, {"versions": 2} if finished else None)
    caplog.clear()
    assert open_run(folder).metrics == lines
    known = has and (finished or left[-1:] == [2])
    assert (f"metrics.jsonl has {has} lines up to version 2" in caplog.text) == bool(known)
    assert known or not caplog.text


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_without_a_run_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not a run's folder \\(no config") as refused:
        open_run(name)
    advises(refused.value, "(no config.yaml); name one in runs/")
    with pytest.raises(ConfigError, match="there is no such home folder") as refused:
        open_run("~nobody-of-this-name/run")
    advises(refused.value, "there is no such home folder; name one in runs/")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").touch()
    open_run("runs/a")
