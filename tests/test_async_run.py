"""Complete asynchronous runs by command: real speeds, replay of a real run, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

SMALL = [
    "corpus=stdlib",
    "tokenizer=bytes",
    "partition=iid",
    "partition.clients=4",
    "model.n_layer=1",
    "model.n_embd=32",
    "model.n_head=2",
    "model.block_size=32",
    "local.steps=5",
    "local.batch_size=4",
    "pace=buffer",
    "pace.clients=4",
    "runtime.threads=1",
    "local.precision=fp32",
    "evaluate=ends",
    "evaluate.tokens=2048",
    "seed=5",
]
LONG = 300  # seconds; bounds every wait
pytestmark = pytest.mark.long


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


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "fedgpt", "run", *options]


def finish(env, *options: str) -> None:
    done = subprocess.run(
        command(*options), env=env, capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_clients_of_unequal_speed_never_wait_and_the_run_can_be_replayed(tmp_path, env):
    """Faster clients contribute more; a replay on the virtual clock gives the same weights."""
    real, again = tmp_path / "real", tmp_path / "again"
    speeds = "fleet.step_seconds=[0.04,0.08,0.16,0.32]"  # jobs of 0.2, 0.4, 0.8 and 1.6 s
    finish(env, *SMALL, "fleet=constant", speeds, "rounds=60", "pace.dylu=false", f"run_dir={real}")
    taken = [event for event in events(real) if event["event"] == "accept"]
    counts = [count for _, count in sorted(Counter(event["client"] for event in taken).items())]
    assert counts[0] > 1.4 * counts[1] > 1.4 * 1.4 * counts[2] > 1.4 * 1.4 * counts[3] > 0
    assert max(event["staleness"] for event in taken) >= 4
    sent = {
        (e["client"], e["number"]): e["seconds"] for e in events(real) if e["event"] == "dispatch"
    }
    back = {(e["client"], e["number"]): e["seconds"] for e in taken}
    waits = [
        sent[client, number + 1] - back[client, number]
        for client, number in back
        if (client, number + 1) in sent
    ]
    assert sorted(waits)[len(waits) // 2] < 0.1, (
        "a client that has finished gets the newest model at once"
    )

    record = f"fleet.path={real / 'events.jsonl'}"
    finish(
        env,
        *SMALL,
        "clock=virtual",
        "fleet=replay",
        record,
        "rounds=60",
        "runtime.workers=1",
        f"run_dir={again}",
    )
    assert summary(again)["weights_sha256"] == summary(real)["weights_sha256"]
    assert [(e["client"], e["number"]) for e in events(again) if e["event"] == "accept"] == [
        (e["client"], e["number"]) for e in taken
    ]


def test_a_run_with_dylu_can_be_replayed(tmp_path, env):
    """Slower clients take fewer steps; the first job of a worker is not measured."""
    real, again = tmp_path / "real", tmp_path / "again"
    pace = ["rounds=40", "local.steps=8", "pace.dylu=true"]
    finish(
        env, *SMALL, *pace, "fleet=constant", "fleet.step_seconds=[0.03,0.12]", f"run_dir={real}"
    )
    taken = [event for event in events(real) if event["event"] == "accept"]
    assert {event["number"] for event in taken if not event["measured"]} == {0}
    steps = {
        event["client"]: event["steps"] for event in events(real) if event["event"] == "dispatch"
    }
    assert len(set(steps.values())) > 1
    record = f"fleet.path={real / 'events.jsonl'}"
    finish(env, *SMALL, *pace, "clock=virtual", "fleet=replay", record, f"run_dir={again}")
    assert summary(again)["weights_sha256"] == summary(real)["weights_sha256"]


def test_a_virtual_run_killed_and_resumed_equals_the_uninterrupted_run(tmp_path, env):
    options = [
        *SMALL,
        "clock=virtual",
        "fleet=published",
        "rounds=120",
        "checkpoint.every=3",
        "strategy=fedasync",
    ]
    finish(env, *options, f"run_dir={tmp_path / 'uninterrupted'}", "runtime.workers=1")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(*options, f"run_dir={killed}"), env=env, stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + LONG
    while sum(event["event"] == "version" for event in complete_lines(killed)) < 40:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finish(env, f"resume={killed}")
    drop = {"wall_seconds"}
    same = [
        {k: v for k, v in summary(tmp_path / name).items() if k not in drop}
        for name in ("uninterrupted", "killed")
    ]
    assert same[0] == same[1]
    accepted = [
        [
            (e["client"], e["number"], e["seconds"])
            for e in events(tmp_path / name)
            if e["event"] == "accept"
        ]
        for name in ("uninterrupted", "killed")
    ]
    assert accepted[0] == accepted[1], "no update is lost or counted twice"


def complete_lines(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
