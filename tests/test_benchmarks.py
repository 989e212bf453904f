"""Each benchmark runs, and its last line is JSON with its figures; no test asserts a speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


RULES = {"exact_10m_x32", "median_x8", "trimmed_x8", "krum_x8"}
SIDES = {"seconds_fedgpt", "seconds_plain", "rounds", "pairs", "clients"}
FIGURES = {
    "overhead": {"overhead", "overhead_cpu", *SIDES},
    "aggregate": {"exact_model_copies", *RULES},
    "clock": {"events_per_second"},
    "compress": set(),
    "train": {"nano_plain_over_fedgpt", "nano_tokens_per_second"},
    "link": {"seconds_5mb", "floor_seconds_5mb", "peak_vectors_link_5mb"},
    "memory": {"growth_model_copies", "model_bytes", "peak_8", "peak_64"},
}
LONG = {"link", "overhead", "memory"}  # more than a minute each


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")
@pytest.mark.parametrize(
    "name, keys",
    [
        pytest.param(name, keys, id=name, marks=[pytest.mark.long] if name in LONG else [])
        for name, keys in FIGURES.items()
    ],
)
def test_the_last_line_of_a_benchmark_is_json_with_its_figures(name, keys, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert keys | {"cores", "torch"} <= figures.keys()
    assert all(isinstance(figures[key], int | float) for key in keys)
    if name == "aggregate":
        assert max(figures[f"{rule}_error"] for rule in RULES) < 1e-6
    if name == "overhead":
        assert figures["distance"] < 0.2, "both sides train the same clients on the same batches"
    assert not list(tmp_path.iterdir()), "a benchmark leaves no files in the current folder"
