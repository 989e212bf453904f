"""Runs with a codec, a corpus and a partition from outside fedgpt.

Their module consists of the examples of the three interfaces (support/third_party.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import third_party
from support.here import run_here, tiny_model

import fedgpt
from fedgpt.core.faults import Injected, injected

CUSTOM = [
    "corpus=custom",
    f"corpus._target_={third_party.MODULE}.Poems",
    "corpus.arguments={stanzas: 1}",
    "partition=custom",
    f"partition._target_={third_party.MODULE}.Alternate",
    "partition.arguments={clients: 3}",
    "update=custom",
    f"update._target_={third_party.MODULE}.Sign",
    "update.arguments={step: 0.002}",
    "update.error_feedback=true",
    third_party.TRUSTED,
]


def test_a_run_with_third_party_classes_is_the_same_after_an_interruption(tmp_path):
    words = [*tiny_model(), *CUSTOM, f"cache_dir={tmp_path / 'cache'}"]
    uninterrupted = run_here(*words, f"run_dir={tmp_path / 'uninterrupted'}")
    assert uninterrupted["versions"] == 3 and uninterrupted["rejected"] == {}
    # the codec sends one byte a parameter, a quarter of float32, and a header
    assert uninterrupted["bytes_up"] < 0.3 * uninterrupted["bytes_down"]
    with injected("aggregate:2:raise"), pytest.raises(Injected):
        run_here(*words, f"run_dir={tmp_path / 'interrupted'}")
    interrupted = run_here(*words, f"run_dir={tmp_path / 'interrupted'}")
    assert interrupted["weights_sha256"] == uninterrupted["weights_sha256"]
    assert any((tmp_path / "cache").glob("custom-*/manifest.json"))


@pytest.mark.slow
def test_every_command_works_with_third_party_classes_from_an_empty_folder(tmp_path):
    third_party.write(tmp_path)
    root = str(Path(fedgpt.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), root])}

    def command(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fedgpt", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = [*tiny_model(), *CUSTOM, f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path}"]
    shown = command("data", *words)
    assert f"{third_party.MODULE}.Poems" in shown and "client-002" in shown
    assert "weights" in command("run", *words)
    digest = json.loads((tmp_path / "run" / "summary.json").read_text())["weights_sha256"]
    for file in (tmp_path / "run" / "model").iterdir():  # `resume` must write them again
        file.unlink()
    command("run", f"resume={tmp_path / 'run'}")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["weights_sha256"] == digest
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert command("generate", str(tmp_path / "run"), "--prompt", "The river")
