"""Processes that are killed at every named point, and resumed until the run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedgpt.storage.run_folder import read_lines

LONG = 240.0  # seconds; bounds every wait
SMALL = [
    "corpus=stdlib",
    "tokenizer=bytes",
    "partition=iid",
    "partition.clients=4",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "model.block_size=16",
    "local.steps=2",
    "local.batch_size=2",
    "runtime.threads=1",
    "local.precision=fp32",
    "evaluate.tokens=1024",
    "evaluate.samples=0",
    "seed=5",
]
SERVER = (
    "open:1",
    "send:1",
    "accepted:3",
    "aggregate:2",
    "checkpoint.begin:4",
    "checkpoint.written:5",
    "checkpoint.renamed:6",
    "checkpoint.committed:7",
    "evaluated:6",
)
WORKER = ("client.begin:3", "client.done:9")


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    return {
        **os.environ,
        **quiet,
        "FEDGPT_CACHE": str(home / "cache"),
        "FLWR_HOME": str(home / "flwr"),
    }


def start(env: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedgpt", "run", *options]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LONG, check=False
    )


def run_to_the_end(
    env: dict[str, str], faults: tuple[str, ...], folder: Path, options: list[str]
) -> int:
    """Start a run and resume it after each death of the server; returns the number of deaths.

    Every fault must have fired.
    """
    marks = folder.parent / f"{folder.name}-marks"
    marks.mkdir()
    env = {
        **env,
        "FEDGPT_FAULT": ",".join(f"{fault}:kill" for fault in faults),
        "FEDGPT_FAULT_MARKS": str(marks),
    }
    deaths = 0
    done = start(env, *options, f"run_dir={folder}")
    while done.returncode != 0:
        assert done.returncode == -signal.SIGKILL, done.stdout[-1000:] + done.stderr[-3000:]
        deaths += 1
        assert deaths <= len(faults), "it died at a point without a fault"
        done = start(env, f"resume={folder}")
    for fault in faults:
        point, _, time = fault.partition(":")
        assert (marks / f"{point}.{time}").stat().st_size >= int(time), f"{fault} was never reached"
    return deaths


def summary(folder: Path) -> dict:
    return {**json.loads((folder / "summary.json").read_text()), "wall_seconds": 0}


def accepted(folder: Path) -> list[tuple[str, int]]:
    return [
        (e["client"], e["number"])
        for e in read_lines(folder / "events.jsonl")
        if e["event"] == "accept"
    ]


@pytest.mark.long
def test_a_synchronous_run_killed_at_every_point_equals_the_uninterrupted_run(tmp_path, env):
    """With a journal, so that its points are reached; workers are killed during and after a job."""
    options = [*SMALL, "rounds=9", "checkpoint.journal=true"]
    done = start(env, *options, f"run_dir={tmp_path / 'uninterrupted'}")
    assert done.returncode == 0, done.stderr
    faults = (*SERVER, "journal.half:9")
    assert run_to_the_end(env, (*faults, *WORKER), tmp_path / "killed", options) == len(faults)
    assert summary(tmp_path / "killed") == summary(tmp_path / "uninterrupted")
    assert sorted(accepted(tmp_path / "killed")) == sorted(accepted(tmp_path / "uninterrupted"))


@pytest.mark.long
def test_after_three_crashes_at_the_start_the_previous_checkpoint_is_used(tmp_path, env):
    options = [*SMALL, "rounds=4"]
    done = start(env, *options, f"run_dir={tmp_path / 'uninterrupted'}")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "killed"
    # in reverse order, because a fault that kills hides those behind it
    faults = ("aggregate:3", "open:4", "open:3", "open:2")
    assert run_to_the_end(env, faults, folder, options) == 4
    assert [path.name for path in (folder / "checkpoints").glob("*.damaged")] == [
        "version-00000002.damaged"
    ]
    assert summary(folder) == summary(tmp_path / "uninterrupted")


@pytest.mark.long
@pytest.mark.parametrize(
    ("unit", "faults"),
    [
        (["privacy=client", "pace.rate=0.5", "pace.clients=0"], ("checkpoint.begin:3",)),
        (["privacy=example"], ("client.done:5",)),
    ],
    ids=["client", "example"],
)
def test_a_private_run_that_is_killed_pays_for_every_release_once(tmp_path, env, unit, faults):
    """Killed between payment and release, or after a job that its client has paid for.

    The noise is seeded, so that the runs can be compared.
    """
    noise = ["privacy.noise_multiplier=1.5", "privacy.target_epsilon=null", "privacy.rng=seeded"]
    options = [*SMALL, *unit, *noise, "rounds=3"]
    done = start(env, *options, f"run_dir={tmp_path / 'uninterrupted'}")
    assert done.returncode == 0, done.stderr
    run_to_the_end(env, faults, tmp_path / "killed", options)
    assert summary(tmp_path / "killed") == summary(tmp_path / "uninterrupted")
    paid = [
        json.loads((tmp_path / name / "ledger.json").read_text())["events"]
        for name in ("uninterrupted", "killed")
    ]
    assert paid[0] == paid[1] and sum(event["count"] for event in paid[0]) >= 3


@pytest.mark.long
def test_an_asynchronous_run_that_is_killed_loses_and_repeats_no_update(tmp_path, env):
    """The order of updates depends on timing, but each update counts once."""
    options = [*SMALL, "rounds=60", "pace=buffer", "pace.clients=4"]
    folder = tmp_path / "killed"
    faults = (
        "accepted:7",
        "send:20",
        "journal.half:44",
        "aggregate:33",
        "checkpoint.renamed:12",
        "accepted:52",
    )
    run_to_the_end(env, (*faults, "client.begin:17"), folder, options)
    counts = Counter(accepted(folder))
    assert sum(counts.values()) == 60 and max(counts.values()) == 1
    assert summary(folder)["versions"] == 60
    assert [r["version"] for r in read_lines(folder / "metrics.jsonl")] == list(range(61))
    assert summary(folder)["rejected"] == {}, "a worker that dies is no failure of its client"


@pytest.mark.long
def test_a_full_disk_is_a_clear_error_and_leaves_no_incomplete_checkpoint(tmp_path, env):
    """No file may exceed 60 kB: the metrics fit, a checkpoint does not.

    flower/test_serve.py tests other files.
    """
    options = [*SMALL, "rounds=2", "model.n_embd=32"]
    folder = tmp_path / "run"
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limit += "import fedgpt.__main__ as it; sys.exit(it.main())"
    command = [sys.executable, "-c", limit, "run", *options, f"run_dir={folder}"]
    # this run prepares the text in the cache
    assert start(env, *options, "rounds=1", f"run_dir={tmp_path / 'cache'}").returncode == 0
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        f"could not write a checkpoint in {folder}: " in done.stderr
        and "File too large" in done.stderr
    )
    assert done.stderr.endswith(f"make room and continue with: fedgpt run resume={folder}\n")
    assert not (folder / "checkpoints" / "starts.json").exists(), "it did not crash"
    assert not list((folder / "checkpoints").glob("*.s*a*")), "no incomplete checkpoint"
    assert start(env, f"resume={folder}").returncode == 0, "with free space the run continues"
