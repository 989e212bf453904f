"""The study of faults and attacks on a deployment: its page, and a smoke run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"
sys.path.insert(0, str(SIMULATION))
from faults import shown  # noqa: E402

RESULTS = json.loads((SIMULATION / "results.json").read_text())


def test_the_page_has_the_tables_of_the_recorded_study():
    page = (SIMULATION / "README.md").read_text()
    assert shown(RESULTS["faults"], RESULTS["attacks"]) in page
    assert RESULTS["command"] in page


def test_nothing_is_wrong_in_the_recorded_study():
    assert RESULTS["problems"] == []
    end = RESULTS["end"]
    assert (end["lost"], end["twice"], end["updates"]) == (0, 0, end["versions"])


@pytest.mark.slow
@pytest.mark.long
def test_a_smoke_run_prints_tables_and_does_not_change_the_results(tmp_path):
    before = (SIMULATION / "results.json").read_bytes()
    command = [sys.executable, str(SIMULATION / "faults.py"), "--quick"]
    command += ["--folder", str(tmp_path / "deployment")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "| client stopped and started" in done.stdout
    assert "digest_mismatch" in done.stdout and "403 forged_sender" in done.stdout
    assert '"lost": 0, "twice": 0' in done.stdout
    assert (SIMULATION / "results.json").read_bytes() == before
