"""evaluate.samples: how many versions generate a sample, and which."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from support.here import run_here, tiny_run

from fedgpt import api
from fedgpt.core.errors import FedGPTError
from fedgpt.core.faults import Injected, injected
from fedgpt.storage.run_folder import read_lines

PROMPT = "A prompt of this test"


def options(folder: Path, samples: int) -> list[str]:
    words = [word for word in tiny_run(folder) if not word.startswith("evaluate.samples")]
    more = ["evaluate.sample_tokens=3", f"evaluate.prompt={PROMPT}"] if samples else []
    return [*words, f"evaluate.samples={samples}", *more]


def sampled(folder: Path) -> list[int]:
    """The versions with a sample, as metrics.jsonl and samples.md have them."""
    versions = [m["version"] for m in read_lines(folder / "metrics.jsonl") if "sample" in m]
    page = (folder / "samples.md").read_text(encoding="utf-8")
    assert versions == [v for v in range(9) if f"## Version {v}" in page]
    return versions


@pytest.mark.parametrize(
    "samples, versions", [(0, []), (1, [3]), (2, [0, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_as_many_versions_as_asked_for_generate_a_sample(tmp_path, samples, versions, capsys):
    run_here(*options(tmp_path, samples))
    assert sampled(tmp_path / "run") == versions
    shown = PROMPT in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert shown == bool(versions) == (page.count(PROMPT) > 1)  # once in the configuration


def test_a_run_without_samples_is_resumed_without_any(tmp_path):
    words = options(tmp_path, 0)
    with suppress(FedGPTError, Injected), injected("aggregate:2:raise"):
        run_here(*words)
    assert not (tmp_path / "run/summary.json").exists()
    api.run(f"resume={tmp_path / 'run'}")
    assert sampled(tmp_path / "run") == []
