"""The folder of a run: made for it alone, removed if the run is refused, or refused by name."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.advice import advises
from support.here import run_here, tiny_run

from fedgpt.cli import dispatch
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import PRIVATE, replacing, write_text
from fedgpt.storage.run_folder import RunFolder, made_folder

NOBODY = 65534


def test_runs_that_begin_in_one_second_get_folders_of_their_own(tmp_path):
    names = []
    for _ in range(3):
        with made_folder(str(tmp_path / "runs" / "now-run"), dated=True) as folder:
            names.append(folder.name)
    assert names == ["now-run", "now-run-2", "now-run-3"]


def test_two_runs_of_one_second_without_run_dir_end_in_two_folders(tmp_path, monkeypatch):
    """The name of the folder has no more than seconds in it; here it is the same for all."""
    words = [o for o in tiny_run(tmp_path) if not o.startswith(("run_dir", "rounds"))]
    from fedgpt.config import compose

    load = compose.load
    default = str(tmp_path / "runs" / "2026-01-01_00-00-00-run")

    def at_one_second(words, config_dir=None):
        options = load(words, config_dir)
        options.run_dir = default
        return options

    monkeypatch.setattr(compose, "load", at_one_second)
    for seed in range(2):
        run_here(*words, "rounds=1", f"seed={seed}")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "2026-01-01_00-00-00-run",
        "2026-01-01_00-00-00-run-2",
    ]


def test_a_refused_run_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = tiny_run(tmp_path)
    assert dispatch("run", ["runtime=inprocess", *words, "partition.piece=999999"]) != 0
    assert dispatch("run", ["runtime=inprocess", *words, "corpus.path=nowhere"]) == 2
    dated = [o for o in words if not o.startswith("run_dir")]
    assert dispatch("run", ["runtime=inprocess", *dated, "corpus.path=nowhere"]) == 2
    deep = [*dated, "run_dir=deep/er/run", "partition=iid", "partition.clients=4000"]
    assert dispatch("run", ["runtime=inprocess", *deep]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) in (["cache", "text"], ["text"])
    assert "Traceback" not in capsys.readouterr().err


# what a run is refused for, from the first check to the last one
LATE = {
    "no GPU": ["runtime.device=cuda"],
    "no place for the cache": ["cache_dir=/proc/x"],
    "text too short": ["model.block_size=100000"],
    "too many clients": ["partition=iid", "partition.clients=4000"],
    "bad accounting": ["privacy=client", "privacy.separation=3", "pace.clients=2"],
    "public text too short": ["strategy=fltrust", "corpus.public=0.01", "model.block_size=1000"],
}


@pytest.mark.parametrize("why", LATE)
def test_a_late_refusal_leaves_what_was_there_and_nothing_else(why, tmp_path, capsys):
    if why == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = [o for o in tiny_run(tmp_path) if not o.startswith("run_dir")]
    (tmp_path / "mine" / "sub").mkdir(parents=True)
    (tmp_path / "mine" / "sub" / "notes.txt").write_text("keep")
    (tmp_path / "parent").mkdir()
    for run in ("mine", "parent/run", "new/er/run"):
        chosen = [*words, f"run_dir={tmp_path / run}", *LATE[why]]
        assert dispatch("run", ["runtime=inprocess", *chosen]) == 2
        assert "1 problem in the configuration" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"mine", "parent", "text"}
    assert (tmp_path / "cache").exists() == (not why.startswith("no ")), "text is read last"
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == ["sub", "notes.txt"]
    assert not any((tmp_path / "parent").iterdir())


def test_a_folder_that_was_there_is_not_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(FedGPTError), made_folder(str(tmp_path / "mine"), dated=False):
        raise FedGPTError("refused")
    assert (tmp_path / "mine").is_dir()


def test_the_folder_of_a_run_that_has_begun_is_not_removed(tmp_path):
    with pytest.raises(FedGPTError), made_folder(str(tmp_path / "r"), dated=False) as folder:
        (folder / "config.yaml").write_text("seed: 0")
        raise FedGPTError("failed")
    assert (tmp_path / "r" / "config.yaml").exists()


def test_a_folder_that_another_process_uses_is_not_removed(tmp_path):
    with pytest.raises(FedGPTError), made_folder(str(tmp_path / "r"), dated=False) as folder:
        other = RunFolder(folder)
        raise FedGPTError("refused")
    assert (tmp_path / "r").is_dir()
    other.close()


@pytest.mark.parametrize("path", ["/proc/x", "/dev/null/x", "/sys/kernel/x", "file/run", "a" * 300])
def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    making = made_folder(str(Path(path).absolute()), dated=False)
    with pytest.raises(ConfigError, match=r"run_dir=.*cannot be written \(") as refused:
        making.__enter__()
    advises(refused.value, "; name another folder")
    with pytest.raises(ConfigError, match=r"run_dir=.*cannot be written"):
        RunFolder(Path(path).absolute())
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with made_folder(str(tmp_path / "another"), dated=False) as folder:
        RunFolder(folder).close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_without_permission_it_is_refused_by_name(tmp_path):
    script = (
        "import os, filelock, fedgpt.config.compose\n"
        "from fedgpt.api import open_run, resumed\n"
        "from fedgpt.core.errors import FedGPTError\n"
        "from fedgpt.storage.run_folder import RunFolder, made_folder\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "def tried(what):\n"
        "    try: what()\n"
        "    except FedGPTError as error: print(error)\n"
        "tried(lambda: made_folder('/work-of-root/run', False).__enter__())\n"
        f"tried(lambda: RunFolder('{tmp_path}/mine'))\n"
        f"tried(lambda: open_run('{tmp_path}/hidden/run'))\n"
        f"tried(lambda: resumed(['resume={tmp_path}/hidden/run']))\n"
    )
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "hidden").mkdir(mode=0o700)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.count("cannot be written (Permission denied)") == 2, printed
    assert printed.count("cannot be read (Permission denied)") == 2, printed


def test_files_have_the_users_umask_and_private_ones_are_for_their_owner_only(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "shared", "text")
        write_text(tmp_path / "own", "text", mode=PRIVATE)
        with replacing(tmp_path / "weights") as temporary:  # safetensors sets a mode of its own
            save_file({"params": np.zeros(2)}, temporary)
    finally:
        os.umask(before)
    for name in ("shared", "weights"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "shared", "weights"]


def test_others_may_read_a_runs_results_but_not_what_tells_of_single_clients(tmp_path):
    before = os.umask(0o022)
    try:
        run_here(*tiny_run(tmp_path), "local.moments=keep")
    finally:
        os.umask(before)
    run = tmp_path / "run"
    for path in (p for p in run.rglob("*") if p.is_file()):
        mode, name = stat.S_IMODE(path.stat().st_mode), str(path.relative_to(run))
        if path.suffix == ".safetensors" and not name.startswith(("model/", "checkpoints/best")):
            assert mode == 0o600, name
        elif path.suffix not in (".sha256", ""):
            assert mode == 0o644, name


def test_hydra_chdir_leaves_paths_where_they_were_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [o for o in tiny_run(tmp_path) if not o.startswith(("run_dir", "corpus.path"))]
    typed = ["corpus.path=text", "run_dir=out", "hydra.job.chdir=true", "runtime=inprocess"]
    assert dispatch("run", [*words, *typed]) == 0
    assert f"path: {tmp_path / 'text'}" in (tmp_path / "out" / "config.yaml").read_text()
    assert Path.cwd() == tmp_path
