"""Studies: their pages agree with results.json, and a smoke run prints a table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SIMULATIONS = Path(__file__).parent.parent / "simulations"
STUDIES = sorted(path.parent.name for path in SIMULATIONS.glob("*/run.py"))


# studies whose smoke run takes more than a minute
LONG = {"async_vs_sync", "auto", "chaos", "compression", "privacy", "scaling", "strategies"}


def files(study: str) -> dict[str, bytes]:
    """The contents of a study's folder."""
    return {
        path.name: path.read_bytes() for path in (SIMULATIONS / study).iterdir() if path.is_file()
    }


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_says_how_to_run_it_and_does_not_train_itself(study):
    command = f"python simulations/{study}/run.py"
    source = (SIMULATIONS / study / "run.py").read_text()
    assert command in source
    assert "import torch" not in source
    readme = SIMULATIONS / study / "README.md"
    assert not readme.exists() or command in readme.read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_every_loss_in_the_tables_of_a_page_is_in_results_json(study):
    results, readme = SIMULATIONS / study / "results.json", SIMULATIONS / study / "README.md"
    recorded = {f"{number:.3f}" for number in numbers(json.loads(results.read_text()))}
    rows = [line for line in readme.read_text().splitlines() if line.startswith("|")]
    shown = [
        number for row in rows for number in re.findall(r"(?<![\d.,])[1-9]\d*\.\d{3}(?!\d)", row)
    ]
    assert [number for number in shown if number not in recorded] == []


def numbers(tree: Any) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from numbers(part)
    elif isinstance(tree, int | float):
        yield float(tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "study",
    [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in STUDIES],
)
def test_a_smoke_run_prints_a_table_and_does_not_change_the_results(study, tmp_path):
    before = files(study)
    script = SIMULATIONS / study / "run.py"
    command = [sys.executable, str(script), "--quick", "--runs", str(tmp_path / "runs")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = done.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| "))
    assert set(lines[head + 1]) <= set("|- ")
    assert lines[head + 2].count("|") == lines[head].count("|")
    assert files(study) == before
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
