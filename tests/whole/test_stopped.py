"""Runs that are stopped and resumed, that end early, or whose options are wrong or have changed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.world import (
    ROUNDS,
    STOPPED,
    World,
    summary,
    untimed,
    wait_until,
    without_notices,
)

from fedgpt import cli
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.run_folder import read_lines


def stop(
    world: World, arguments: list[str], folder: Path, version: int, how: Callable[[int], None]
) -> tuple[int, str]:
    """Start a run and call `how` with its process id once the jobs of `version` are sent.

    Returns the exit code and stderr.
    """
    with (world.root / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedgpt", "run", *arguments],
            env=world.env,
            cwd=world.root,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:

            def dispatched() -> bool:
                assert process.poll() is None, "the run ended before it could be stopped"
                events = read_lines(folder / "events.jsonl")
                return any(e["event"] == "dispatch" and e["version"] == version for e in events)

            wait_until(dispatched)
            how(process.pid)
            process.wait(60)
        finally:
            process.kill()
            process.wait(60)
        errors.seek(0)
        return process.returncode, errors.read()


def assert_equals_uninterrupted(world: World, folder: Path, results: dict[str, Any]) -> None:
    """Every number of the resumed run equals that of the uninterrupted run."""
    uninterrupted, resumed = results["uninterrupted"], summary(folder)
    assert resumed["weights_sha256"] == uninterrupted["weights_sha256"]
    assert {**resumed, "wall_seconds": 0} == {**uninterrupted, "wall_seconds": 0}
    assert untimed(folder) == untimed(world.root / "uninterrupted")
    assert [r["state_lost"] for r in untimed(folder)] == [0] * (ROUNDS + 1)


def test_a_run_stopped_by_sigkill_and_then_by_sigterm_equals_the_uninterrupted_run(world, results):
    """SIGKILL loses what follows the last checkpoint, SIGTERM only the version in progress.

    A checkpoint is written every second version.
    """
    folder = world.root / "killed"
    start = [*world.options, *STOPPED, f"run_dir={folder}"]
    code, _ = stop(world, start, folder, 3, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL
    wait_until(lambda: not world.processes(), 30)
    assert not (folder / "summary.json").exists()
    assert Checkpoints(folder / "checkpoints", 2).load().state.version in (0, 2)

    code, errors = stop(
        world, [f"resume={folder}"], folder, 4, lambda pid: os.kill(pid, signal.SIGTERM)
    )
    assert code == 130 and "Traceback" not in errors
    assert without_notices(errors) == (
        f"fedgpt: interrupted; continue with: fedgpt run resume={folder}\n"
    )
    assert Checkpoints(folder / "checkpoints", 2).load().state.version == 4
    assert not (folder / "summary.json").exists()

    words = shlex.split(errors.rpartition("fedgpt run ")[2])
    done = world.fedgpt("run", *words)
    assert f"from version 4 of {ROUNDS}" in done.stdout
    assert not without_notices(done.stderr)
    assert_equals_uninterrupted(world, folder, results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, version",
    [(signal.SIGINT, 1), (signal.SIGTERM, 0), (signal.SIGKILL, 0), (signal.SIGKILL, ROUNDS - 1)],
    ids=["SIGINT", "SIGTERM in the first", "SIGKILL in the first", "SIGKILL in the last"],
)
def test_a_run_stopped_once_and_resumed_equals_the_uninterrupted_run(
    world, results, number, version
):
    """SIGINT is sent as a terminal sends it: to all processes of the run at once."""
    folder = world.root / f"{number.name}-{version}"
    send = os.killpg if number == signal.SIGINT else os.kill
    code, errors = stop(
        world,
        [*world.options, *STOPPED, f"run_dir={folder}"],
        folder,
        version,
        lambda pid: send(pid, number),
    )
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 130 and f"fedgpt run resume={folder}" in errors and "Traceback" not in errors
    wait_until(lambda: not world.processes(), 30)
    world.fedgpt("run", f"resume={folder}")
    assert_equals_uninterrupted(world, folder, results)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_starts_no_other_run(world):
    """Its exit code is that of a stopped run, whose folder the message names."""
    code, errors = stop(
        world,
        ["-m", *world.options, *STOPPED, "seed=1,2", "run_dir=swept-${seed}"],
        world.root / "swept-1",
        0,
        lambda pid: os.kill(pid, signal.SIGTERM),
    )
    assert code == 130 and "Traceback" not in errors
    assert errors.endswith(f"continue with: fedgpt run resume={world.root / 'swept-1'}\n")
    assert not (world.root / "swept-2").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["run", "data"])
def test_a_command_that_is_stopped_before_its_work_ends_with_130(
    tmp_path, monkeypatch, capsys, command, number
):
    """While the text is read there is no run yet that could be continued."""
    source = f"""
import os, signal
from dataclasses import dataclass
from fedgpt.data.corpora.base import Corpus

@dataclass(frozen=True)
class Stops(Corpus):
    def documents(self):
        os.kill(os.getpid(), {int(number)})
        yield from ()
"""
    (tmp_path / "stops.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    corpus = ["corpus=custom", "corpus._target_=stops.Stops", "trusted_packages=[stops]"]
    try:
        assert cli.dispatch(command, [*corpus, f"cache_dir={tmp_path / 'cache'}"]) == 130
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.modules.pop("stops", None)
    assert capsys.readouterr().err.endswith("fedgpt: interrupted\n")
    assert not (tmp_path / "runs").exists()


def test_too_few_updates_end_the_run_with_exit_code_3_and_the_reason(world):
    folder = world.root / "hurried"
    done = world.fedgpt(
        "run",
        *world.options,
        f"run_dir={folder}",
        "pace.deadline=0.01",
        "pace.minimum=2",
        "runtime.workers=1",
        code=3,
    )
    assert "version 1 got 0 valid updates of 3 jobs, pace.minimum=2: no_reply x3" in done.stderr
    assert done.stdout.count("rejected: no_reply (the version closed first)") == 3
    assert not (folder / "summary.json").exists()
    snapshot = Checkpoints(folder / "checkpoints", 2).load()
    assert snapshot.state.version == 0 and snapshot.clients.as_json()["columns"]["accepted"] == {}


def test_a_wrong_option_ends_with_exit_code_2_before_any_work(world):
    done = world.fedgpt(
        "run", *world.options, "run_dir=never", "local.stpes=3", "model.n_head=3", code=2
    )
    assert "local.stpes=3: no option 'local.stpes'; did you mean 'local.steps'" in done.stderr
    assert "model.n_embd=16: must be a multiple of model.n_head=3" in done.stderr
    assert not (world.root / "never").exists()


def test_a_resume_with_changed_options_is_refused_with_their_names(world, finished):
    """Users may read and edit config.yaml; a checkpoint has the options that it was made with."""
    folder = world.root / "edited"
    shutil.copytree(finished.folder, folder)
    config = folder / "config.yaml"
    config.write_text(
        config.read_text().replace("rounds: 2", "rounds: 3").replace("  lr: 0.003", "  lr: 0.004")
    )
    (folder / "summary.json").unlink()
    done = world.fedgpt("run", f"resume={folder}", code=1)
    assert "(local.lr: 0.003 -> 0.004);" in done.stderr and "Traceback" not in done.stderr
