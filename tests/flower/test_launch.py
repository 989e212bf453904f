"""What a launcher and the processes that it starts tell each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Metadata, RecordDict
from flwr.app.message import make_message
from support import third_party
from support.here import tiny_run

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.flower import client_app, server_app
from fedgpt.flower.failure import FAILURE_FILE, raise_failure
from fedgpt.flower.launch import import_path
from fedgpt.flower.messages import read_info
from fedgpt.flower.run_config import run_config_of

PROBLEM = r"corpus\._target_=absent\.Poems: cannot import absent"


@pytest.fixture(scope="module")
def absent() -> dict[str, Any]:
    """Options that name a class which this process cannot import."""
    options = compose.load(
        ["corpus=custom", f"corpus._target_={third_party.MODULE}.Poems", third_party.TRUSTED]
    )
    options.corpus._target_, options.trusted_packages = "absent.Poems", ["absent"]
    return run_config_of(options)


def served(run_config: dict[str, Any]) -> None:
    server_app.app(None, Context(1, 1, {}, RecordDict(), run_config))


def test_the_error_of_a_server_reaches_its_launcher(absent, tmp_path, monkeypatch):
    """Also where the options cannot be read, so the server does not know its run folder."""
    file = tmp_path / "run" / "failure.json"
    raise_failure(file)
    monkeypatch.setenv(FAILURE_FILE, str(file))
    served(absent)
    with pytest.raises(ConfigError, match=PROBLEM) as caught:
        raise_failure(file)
    assert len(caught.value.problems) == 1 and str(caught.value).startswith("1 problem in")


@pytest.mark.parametrize("error", [StoppedEarly("too few clients"), FedGPTError("no space")])
def test_an_error_keeps_its_class_and_message(error, tmp_path, monkeypatch):
    def failing(options, grid):
        raise error

    monkeypatch.setattr(server_app, "serve", failing)
    monkeypatch.setenv(FAILURE_FILE, str(tmp_path / "failure.json"))
    served({"config": "", "overrides": ""})
    with pytest.raises(type(error)) as caught:
        raise_failure(tmp_path / "failure.json")
    assert type(caught.value) is type(error) and str(caught.value) == str(error)


@pytest.mark.parametrize("file", [None, "a file/failure.json"])
def test_an_error_that_no_launcher_can_read_is_raised(file, absent, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.delenv(FAILURE_FILE, raising=False)
    if file:
        monkeypatch.setenv(FAILURE_FILE, str(tmp_path / file))
    with pytest.raises(ConfigError, match=PROBLEM):
        served(absent)


def test_a_client_that_cannot_read_the_options_answers_with_the_reason(absent):
    metadata = Metadata(1, "", 0, 1, "", "", 0.0, 60.0, "query")
    question = make_message(metadata, RecordDict())
    answer = client_app.app(question, Context(1, 1, {"partition-id": 0}, RecordDict(), absent))
    with pytest.raises(ConfigError, match=PROBLEM):
        read_info(answer)


def test_a_child_process_imports_from_the_same_folders_in_the_same_order(tmp_path, monkeypatch):
    """A user's folder at the end does not take the place of a module of Python's own."""
    (tmp_path / "mine.py").touch()
    (tmp_path / "queue.py").write_text("raise AssertionError('the module of Python is meant')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    environment = {"PYTHONPATH": import_path()}
    script = "import mine, queue; print(mine.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=os.sep,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "mine.py"


def test_what_the_clients_text_rules_out_is_refused_before_torch_is_imported(tmp_path):
    many = ["partition=iid", "partition.clients=17", "partition.piece=16"]
    refused = {
        "each needs": ["partition=iid", "partition.clients=4000"],
        "none of 2 natural clients": ["model.block_size=100000"],
        "cannot fill": ["privacy=client", "privacy.separation=3", "pace.clients=2"],
        "runtime=superlink: starts": ["runtime=superlink", *many],
        "strategy.attackers=1 needs at least 5": ["strategy=krum", "pace.clients=0"],
        "attack.clients=3: is above": ["attack=scale", "attack.clients=3"],
        "tokens are public": ["strategy=fltrust", "corpus.public=0.01", "model.block_size=999"],
    }
    words = tiny_run(tmp_path)
    script = (
        "import sys\nfrom fedgpt.cli import dispatch\n"
        f"for chosen in {list(refused.values())!r}:\n"
        f"    assert dispatch('run', [*{words!r}, *chosen]) == 2\n"
        "    assert 'torch' not in sys.modules, chosen\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stderr for part in refused), done.stderr
    assert not (tmp_path / "run").exists()
