"""Runs with a codec, a corpus and a partition from outside fedgpt.

Their module consists of the examples of the interfaces (support/third_party.py).
"""

from __future__ import annotations

import importlib.util
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


def typed_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`fedgpt <words>` typed in a folder, which is not on the PYTHONPATH."""
    return subprocess.run(
        [sys.executable, "-m", "fedgpt", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(fedgpt.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_every_command_works_with_third_party_classes_from_an_empty_folder(tmp_path):
    third_party.write(tmp_path)

    def command(*words: str) -> str:
        done = typed_in(tmp_path, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = [*tiny_model(), *CUSTOM, f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path}"]
    shown = command("data", *words)
    assert f"{third_party.MODULE}.Poems" in shown and "client-002" in shown
    assert "weights" in command("run", *words, "runtime.workers=1")
    digest = json.loads((tmp_path / "run" / "summary.json").read_text())["weights_sha256"]
    for file in (tmp_path / "run" / "model").iterdir():  # `resume` must write them again
        file.unlink()
    command("run", f"resume={tmp_path / 'run'}")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["weights_sha256"] == digest
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert command("generate", str(tmp_path / "run"), "--prompt", "The river")


# ---- in the processes that Flower starts


def one_round(folder: Path) -> list[str]:
    """Options of one round with a corpus and a strategy of the module; two clients have text."""
    return [
        *tiny_model(),
        *CUSTOM[:5],
        "partition.arguments={clients: 2}",
        third_party.TRUSTED,
        "strategy=flower",
        f"strategy._target_={third_party.MODULE}.RootWeighted",
        "rounds=1",
        f"run_dir={folder / 'run'}",
        f"cache_dir={folder / 'cache'}",
    ]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "runtime",
    [
        "superlink",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray"),
        ),
    ],
)
def test_every_process_of_flower_finds_the_classes_in_the_users_folder(runtime, tmp_path):
    third_party.write(tmp_path)
    done = typed_in(tmp_path, "run", f"runtime={runtime}", *one_round(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "RootWeighted: " in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["versions"] == 1 and summary["rejected"] == {}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("program", ["flwr-serverapp", "flwr-clientapp"])
def test_a_class_that_one_process_cannot_import_is_one_message_and_no_traceback(program, tmp_path):
    absent = f'import sys\nif "{program}" in sys.argv[0]:\n    raise ImportError("not here")\n'
    third_party.write(tmp_path, absent)
    done = typed_in(tmp_path, "run", "runtime=superlink", *one_round(tmp_path))
    everything = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 2, everything
    assert f"corpus._target_={third_party.MODULE}.Poems: cannot import" in done.stderr
    assert "not here" in done.stderr and "resume" not in done.stderr
    assert "Traceback" not in done.stdout + done.stderr, everything
