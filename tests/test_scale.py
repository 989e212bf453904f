"""Many clients with the nano model: 50 of 1,000 in each round, and 200 in one round."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMON = [
    "model=nano",
    "tokenizer=bytes",
    "partition=iid",
    "partition.piece=512",
    "local=reset",
    "local.steps=1",
    "local.batch_size=1",
    "evaluate=ends",
    "evaluate.tokens=2048",
    "checkpoint=none",
]


@pytest.mark.slow
@pytest.mark.parametrize("clients, asked, rounds", [(1000, 50, 4), (200, 200, 1)])
def test_many_clients_run_to_the_end(clients, asked, rounds, tmp_path):
    folder = tmp_path / "run"
    sizes = [
        f"partition.clients={clients}",
        f"pace.clients={asked}",
        f"rounds={rounds}",
        f"run_dir={folder}",
    ]
    env = {**os.environ, "FEDGPT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "fedgpt", "run", *COMMON, *sizes]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rejected"] == {}
    assert summary["tokens"] == rounds * asked * 64  # every sampled client's one step counts once
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [m["accepted"] for m in metrics] == [0, *[asked] * rounds]
    assert not (folder / "clients").exists(), "local.moments=reset keeps nothing"
