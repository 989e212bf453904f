"""The same two apps on pool, Ray and SuperLink, and with `flwr run`: one seed, one digest."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from support.here import SMALL

from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.run_folder import read_lines

REPOSITORY = Path(__file__).parent.parent.parent
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="pip install '.[ray]'"
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FEDGPT_CACHE": str(home / "cache"),
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_usage_stats_enabled": "0",
        "FEDGPT_TEST_MARK": uuid.uuid4().hex,
    }


def run(runtime: str, folder: Path, env: dict[str, str], *more: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "fedgpt",
        "run",
        f"runtime={runtime}",
        f"run_dir={folder}",
        *SMALL,
        *more,
    ]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def pool(tmp_path_factory, env) -> dict:
    return run("pool", tmp_path_factory.mktemp("pool") / "run", env, "runtime.workers=1")


def assert_same_run(summary: dict, pool: dict) -> None:
    assert summary["weights_sha256"] == pool["weights_sha256"]
    assert summary["final"] == pool["final"] and summary["tokens"] == pool["tokens"]
    assert summary["rejected"] == {}


@pytest.mark.long
def test_superlink_gives_the_weights_of_the_pool(tmp_path, env, pool):
    assert_same_run(run("superlink", tmp_path / "run", env), pool)
    assert not children_of_flower(env), "the launcher ends the processes that it started"


@needs_ray
def test_ray_gives_the_weights_of_the_pool(tmp_path, env, pool):
    assert_same_run(run("ray", tmp_path / "run", env), pool)
    assert not children_of_flower(env), "the launcher ends the processes that it started"


ASYNCHRONOUS = ["pace=buffer", "strategy=delta_sgd", "rounds=4"]


@pytest.fixture(scope="module")
def virtual_pool(tmp_path_factory, env) -> dict:
    folder = tmp_path_factory.mktemp("virtual") / "run"
    return run("pool", folder, env, *ASYNCHRONOUS, "clock=virtual", "fleet=published")


@pytest.mark.long
@pytest.mark.parametrize("runtime", [pytest.param("ray", marks=needs_ray), "superlink"])
def test_asynchronous_runs_on_both_clocks(runtime, tmp_path, env, virtual_pool):
    """On the virtual clock the weights are those of the pool; on the real clock no client waits."""
    summary = run(
        runtime, tmp_path / "virtual", env, *ASYNCHRONOUS, "clock=virtual", "fleet=published"
    )
    assert_same_run(summary, virtual_pool)
    assert summary["virtual_seconds"] == virtual_pool["virtual_seconds"]
    assert run(runtime, tmp_path / "real", env, *ASYNCHRONOUS)["versions"] == 4
    records = [
        json.loads(line) for line in (tmp_path / "real" / "metrics.jsonl").read_text().splitlines()
    ]
    assert all(record["in_flight"] == 1 for record in records[1:]), (
        "the server never waits for the other client"
    )
    assert not children_of_flower(env)


@needs_ray
@pytest.mark.long
def test_flwr_run_from_the_repository_gives_the_weights_of_the_pool(tmp_path, env, pool):
    """`flwr run . -c 'overrides="..."'`: the options are composed on the server."""
    folder = tmp_path / "run"
    env = {
        **env,
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39391",
    }
    overrides = " ".join([*SMALL, f"run_dir={folder}"])
    command = [
        "flwr",
        "run",
        str(REPOSITORY),
        "local",
        "--run-config",
        f'overrides="{overrides}"',
        "--stream",
        "--federation-config",
        "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2",
    ]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=400, check=False
        )
        assert (folder / "summary.json").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        assert_same_run(json.loads((folder / "summary.json").read_text()), pool)
    finally:
        for pid in children_of_flower(env):  # Flower leaves its local SuperLink running
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        while children_of_flower(env) and time.monotonic() < deadline:
            time.sleep(0.2)


STOPPED = ["rounds=5", "checkpoint.every=0"]  # no checkpoint except that of the interrupt


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, env) -> dict:
    return run("pool", tmp_path_factory.mktemp("uninterrupted") / "run", env, *STOPPED)


@pytest.mark.long
@pytest.mark.parametrize(
    "runtime, number",
    [pytest.param("ray", signal.SIGTERM, marks=needs_ray), ("superlink", signal.SIGINT)],
)
def test_an_interrupted_run_writes_a_checkpoint_and_says_how_to_continue(
    runtime, number, tmp_path, env, uninterrupted
):
    """As on the pool: exit code 130, the command to continue, and then the same weights."""
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fedgpt",
        "run",
        f"runtime={runtime}",
        f"run_dir={folder}",
        *SMALL,
        *STOPPED,
    ]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 200
        while not any(e["event"] == "version" for e in read_lines(folder / "events.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors[-3000:]
    assert errors.endswith(f"fedgpt: interrupted; continue with: fedgpt run resume={folder}\n")
    assert not children_of_flower(env)
    assert Checkpoints(folder / "checkpoints", 2).load().state.version in range(1, 5)
    done = subprocess.run(
        [*command[:4], f"resume={folder}"],
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(json.loads((folder / "summary.json").read_text()), uninterrupted)


def test_superlink_with_too_many_clients_is_refused_with_what_to_change(tmp_path, env):
    command = [
        sys.executable,
        "-m",
        "fedgpt",
        "run",
        "runtime=superlink",
        f"run_dir={tmp_path / 'r'}",
        *SMALL,
    ]
    done = subprocess.run(
        [*command, "partition.clients=17"],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2
    assert "partition.clients=2" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_a_run_whose_supernodes_fail_says_why_it_stopped(tmp_path, env):
    """The reason and the exit code are passed through two processes."""
    command = [
        sys.executable,
        "-m",
        "fedgpt",
        "run",
        "runtime=superlink",
        f"run_dir={tmp_path / 'r'}",
        *SMALL,
    ]
    done = subprocess.run(
        [*command, "pace.deadline=0.01"],
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-2000:]
    assert "pace.minimum=1" in done.stderr and "no_reply" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not children_of_flower(env)


def children_of_flower(env: dict[str, str]) -> list[int]:
    """Ids of live processes of Flower's programs that have this environment."""
    mark = f"FEDGPT_TEST_MARK={env['FEDGPT_TEST_MARK']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            ours = mark in (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            ours
            and state != "Z"
            and any(Path(w).name.startswith(("flower-su", "flwr-")) for w in words[:3])
        ):
            found.append(int(path.name))
    return found
