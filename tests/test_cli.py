"""The command line as a user meets it, in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedgpt import __version__
from fedgpt.__main__ import main


def fedgpt(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedgpt", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


def test_help_imports_nothing_heavy_and_lists_the_groups():
    code = (
        "import sys; sys.argv = ['fedgpt', '--help']; from fedgpt.__main__ import main; main();"
        "heavy = {'torch', 'flwr', 'hydra', 'numpy', 'rich', 'omegaconf'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    for word in (
        "fedgpt run",
        "fedgpt data",
        "fedgpt generate",
        "strategy",
        "diloco",
        "superlink",
        "resume=FOLDER",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    "command", ["run", "data", "audit", "privacy", "privacy plan", "audit privacy=example"]
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedgpt", *command.split(), flag])
    assert main() == 0
    assert f"fedgpt {command.split()[0]} " in capsys.readouterr().out


def test_version():
    assert fedgpt("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "ronds=3"], "did you mean 'rounds'"),
        (["run", "model"], "model: options are typed key=value"),
        (["run", "--bogus"], "--bogus"),
        (["run", "strategy=fedavgg"], "did you mean 'fedavg'"),
        (["run", "-m", "seed=0,x"], "seed=x"),
        (["run", "resume=nowhere"], "is not a run's folder"),
        (["run", "resume=nowhere", "rounds=3"], "stands alone"),
        (["run", "resume="], "resume=: is not a run's folder"),
        (["run", "--cfg", "job", "-m", "seed=0,1"], "--cfg: prints one configuration"),
        (["run", "--config-dir", "nowhere", "seed=1"], "--config-dir nowhere: no such folder"),
        (["data", "--config-dir=nowhere"], "--config-dir nowhere: no such folder"),
        (["generate", "nowhere"], "is not a run's folder"),
        (["generate", "nowhere", "--tokens", "-1"], "--tokens -1: must be at least 0"),
        (["generate", "nowhere", "--top-p", "2"], "--top-p 2.0: must be at least 0 and at most 1"),
        (
            ["generate", "nowhere", "--seed", str(2**70)],
            f"--seed {2**70}: must be at least 0 and at most",
        ),
        (["data", "corpus=files", "corpus.path=nowhere"], "corpus.path="),
    ],
)
def test_a_mistake_is_one_message_and_never_a_traceback(arguments, part, tmp_path):
    done = fedgpt(*arguments, cwd=tmp_path)
    assert part in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "runs").exists(), "no work before the options are right"


def test_cfg_job_prints_the_whole_configuration_without_running(tmp_path):
    done = fedgpt("run", "--cfg", "job", "model=mini", "seed=5", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        "n_embd: 384" in done.stdout
        and "seed: 5" in done.stdout
        and "_target_: fedgpt.aggregate" in done.stdout
    )
    assert not (tmp_path / "runs").exists()
