"""Properties of every runtime: its help, its checks, and the records of its runs."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.here import run_here, tiny_run

from fedgpt import api
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, StoppedEarly
from fedgpt.core.options import RunOptions, RuntimeOptions
from fedgpt.core.runtimes import RUNTIMES, Runtime, runtime_of, runtime_problems

every = pytest.mark.parametrize("name", RUNTIMES.names())


def options_with(name: str, **fields: object) -> RunOptions:
    return RunOptions(runtime=RuntimeOptions(name=name, **fields))


@every
def test_a_runtime_has_the_name_of_its_file_and_help_in_sentences(name):
    runtime = runtime_of(options_with(name))
    assert runtime.name == name and isinstance(runtime, Runtime)
    assert runtime.limits and all(limit.endswith(".") for limit in runtime.limits)


@every
def test_a_runtime_can_be_chosen_by_its_group(name, monkeypatch):
    monkeypatch.setattr(type(runtime_of(options_with(name))), "problems", lambda *_: iter(()))
    assert compose.load([f"runtime={name}"]).runtime.name == name


@every
def test_a_problem_names_the_runtime_and_another_choice(name):
    for clients in (0, 2, 100_000):
        for problem in runtime_problems(options_with(name), clients):
            assert problem.startswith(f"runtime={name}: ") and "runtime=pool" in problem


def test_runtimes_are_checked_without_flower_and_torch():
    """Importing them takes seconds, and a typo must be reported at once."""
    script = (
        "import sys; from fedgpt.core.runtimes import RUNTIMES\n"
        "for name in RUNTIMES.names(): RUNTIMES.load(name)\n"
        "print(*{'flwr', 'torch', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_a_runtime_that_does_not_exist_is_refused():
    problems = list(runtime_problems(options_with("pol"), 0))
    assert problems == [
        "runtime.name=pol: allowed are inprocess, pool, ray, superlink, custom;"
        " did you mean 'pool'?"
    ]


# one run in one process


def test_the_same_weights_in_one_process_and_on_the_pool(tmp_path):
    options = tiny_run(tmp_path)
    alone = run_here(*options)
    pool = api.run("runtime=pool", *options, "runtime.threads=1", f"run_dir={tmp_path / 'pool'}")
    assert alone["weights_sha256"] == pool.summary["weights_sha256"]
    assert alone["final"] == pool.summary["final"] and alone["rejected"] == {}


def test_asynchronous_runs_in_one_process_on_both_clocks(tmp_path):
    """On the virtual clock the order of arrivals does not follow the order of computation."""
    options = [*tiny_run(tmp_path), "pace=buffer", "pace.clients=2", "strategy=delta_sgd"]
    real = run_here(*options)
    assert real["versions"] == 3 and real["rejected"] == {}
    virtual = ["clock=virtual", "fleet=published", f"run_dir={tmp_path / 'virtual'}"]
    assert run_here(*options, *virtual)["virtual_seconds"] > 0


def test_a_client_that_fails_in_this_process_is_an_error_reply(tmp_path, monkeypatch, capsys):
    client = importlib.import_module("fedgpt.client.work")

    def failing(work, job, index):
        raise KeyError("a bug")

    monkeypatch.setattr(client.ClientWork, "train", failing)
    with pytest.raises(StoppedEarly, match="client_error x2"):
        run_here(*tiny_run(tmp_path))
    assert "KeyError: 'a bug'" in capsys.readouterr().err, "the traceback is for the developer"


# a runtime of another package


THIRD_PARTY = '''
"""A runtime outside fedgpt: everything in one process, with a line for each run."""

from dataclasses import dataclass
from pathlib import Path

from fedgpt.core.runtimes import Runtime


@dataclass(frozen=True)
class Logged(Runtime):
    """Writes what it starts to a file."""

    file: str
    name = "logged"

    def problems(self, options, clients):
        if clients > 5:
            yield f"runtime=custom: {clients} clients are more than the 5 that Logged takes"

    def start(self, options, clients, resources, environment):
        from fedgpt.flower.client_app import app
        from fedgpt.flower.in_process_grid import InProcessGrid
        from fedgpt.flower.run_config import run_config_of
        from fedgpt.flower.server_app import run_on

        state = environment["FEDGPT_STATE_DIR"]
        run_on(InProcessGrid(app, clients, run_config_of(options), state), options)
        Path(self.file).write_text(f"{clients} clients, {resources.threads} threads")
'''


@pytest.fixture
def third_party(tmp_path, monkeypatch) -> list[str]:
    """Options for a runtime in a folder outside the package."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "my_runtimes.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(tmp_path / "outside")
    return [
        "runtime=custom",
        "runtime._target_=my_runtimes.Logged",
        f"runtime.arguments={{file: {tmp_path / 'log'}}}",
    ]


def test_a_runtime_of_another_package_runs_to_the_same_weights(tmp_path, third_party):
    options = tiny_run(tmp_path)
    outside = ["trusted_packages=[my_runtimes]", f"run_dir={tmp_path / 'outside' / 'run'}"]
    run = api.run(*options, *third_party, *outside)
    assert (tmp_path / "log").read_text() == "2 clients, 1 threads"
    assert run.summary["weights_sha256"] == run_here(*options)["weights_sha256"]
    assert api.run(f"resume={run.folder}").summary == run.summary


@pytest.mark.parametrize(
    "change, error",
    [
        ([], r"runtime\._target_=my_runtimes\.Logged: .*trusted_packages=\[my_runtimes\]"),
        (
            ["trusted_packages=[my_runtimes]", "partition=iid", "partition.clients=9"],
            "runtime=custom: 9 clients are more than the 5 that Logged takes",
        ),
        (["runtime._target_=null"], r"runtime=custom needs the full name of a class"),
        (["runtime._target_=fedgpt.flower.runtimes.pool.Resources"], "must inherit from"),
    ],
)
def test_a_runtime_of_another_package_is_refused(third_party, change, error):
    with pytest.raises(ConfigError, match=error):
        compose.load([*third_party, *change])


def test_arguments_of_a_runtime_of_another_package_are_checked(third_party):
    with pytest.raises(ConfigError, match="fil"):
        compose.load(
            [*third_party[:2], "runtime.arguments={fil: x}", "trusted_packages=[my_runtimes]"]
        )


def test_a_run_in_one_process_has_the_usual_records(tmp_path):
    run_here(*tiny_run(tmp_path))
    folder: Path = tmp_path / "run"
    accepted = [
        event
        for line in (folder / "events.jsonl").read_text().splitlines()
        if (event := json.loads(line))["event"] == "accept"
    ]
    assert len(accepted) == 6 and not accepted[0]["measured"], "the first job also reads the data"
    assert all(event["measured"] and event["train_seconds"] > 0 for event in accepted[1:])
    assert not (folder / "failure.json").exists()
