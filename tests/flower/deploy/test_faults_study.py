"""A smoke run of the study of faults and attacks on a deployment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"


@pytest.mark.slow
@pytest.mark.long
def test_a_smoke_run_prints_tables_and_does_not_change_the_results(short_folder):
    before = {path.name: path.read_bytes() for path in SIMULATION.glob("*.json")}
    command = [sys.executable, str(SIMULATION / "faults.py"), "--quick"]
    command += ["--folder", str(short_folder / "deployment")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| client stopped and started" in done.stdout
    assert "digest_mismatch" in done.stdout and "403 forged_sender" in done.stdout
    assert '"lost": 0, "twice": 0' in done.stdout
    assert {path.name: path.read_bytes() for path in SIMULATION.glob("*.json")} == before
