"""Run through Flower's own tools on this machine: a loopback SuperLink with SuperNodes, or its Ray
simulation.

The same ServerApp and ClientApp as everywhere; only the processes around them are Flower's. All of
them are children of this process, in process groups of their own, and are ended with it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from fedgpt.config.checks import runtime_problems
from fedgpt.config.compose import to_yaml
from fedgpt.core.errors import ConfigError, FedGPTError, Interrupted, StoppedEarly
from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.flower.serve import STOP_FILE

STOP_SECONDS = 60.0  # that a server has for its checkpoint, once it was asked to stop
APP = """[project]
name = "fedgpt-run"
version = "0.1.0"
description = "One fedgpt run"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedgpt"

[tool.flwr.app.components]
serverapp = "fedgpt.flower.server_app:app"
clientapp = "fedgpt.flower.client_app:app"

[tool.flwr.app.config]
config = ""
overrides = ""
"""


def launch_flwr(
    options: RunOptions, clients: int, resources: Resources, client_env: dict[str, str]
) -> None:
    """Start SuperLink (and SuperNodes), submit the run, stream its log, end everything.

    Raises Interrupted after SIGINT or SIGTERM, where there is something to resume.
    """
    try:
        _launch(options, clients, resources, client_env)
    except KeyboardInterrupt:
        if (Path(options.run_dir) / "config.yaml").exists():
            raise Interrupted(options.run_dir) from None
        raise


def _launch(
    options: RunOptions, clients: int, resources: Resources, client_env: dict[str, str]
) -> None:
    ray = options.runtime.name == "ray"
    if problems := list(runtime_problems(options.runtime.name, clients)):
        raise ConfigError(problems)  # of natural clients the number is known only now
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedgpt-flower-")))
        env = {**os.environ, **client_env, "FLWR_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        env[STOP_FILE] = str(home / "stop")
        # Flower starts its own programs by name: those beside this interpreter come first
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        port = _free_port()
        link = [
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--disable-runtime-dependency-installation",
        ]
        stack.enter_context(
            _child(["flower-superlink", *link, *(["--simulation"] if ray else [])], env, home)
        )
        _wait_healthy(port, home)
        for index in [] if ray else range(clients):
            node = ["--insecure", "--superlink", f"127.0.0.1:{port}"]
            node += ["--host", "127.0.0.1", "--port", str(_free_port())]
            who = ["--node-config", f"partition-id={index} num-partitions={clients}"]
            gpu = (
                {"CUDA_VISIBLE_DEVICES": resources.gpus[index % len(resources.gpus)]}
                if resources.gpus
                else {}
            )
            stack.enter_context(
                _child(["flower-supernode", *node, "--max-retries", "60", *who], env | gpu, home)
            )
        _submit(options, home, env, port, _simulation(clients, resources) if ray else [])


def _submit(
    options: RunOptions, home: Path, env: dict[str, str], port: int, extra: list[str]
) -> None:
    """`flwr run` our two apps with the whole configuration; the run folder tells how it ended."""
    app = home / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    # a JSON string without escapes beyond the Basic Multilingual Plane is a TOML string
    (home / "run.toml").write_text(
        f"config = {json.dumps(to_yaml(options), ensure_ascii=False)}\n", encoding="utf-8"
    )
    (home / "config.toml").write_text(
        f'[superlink.fedgpt]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    folder = Path(options.run_dir)
    for name in ("summary.json", "failure.json"):
        (folder / name).unlink(missing_ok=True)
    submit = [
        "flwr",
        "run",
        str(app),
        "fedgpt",
        "--run-config",
        str(home / "run.toml"),
        "--stream",
        *extra,
    ]
    with _child(submit, env, home, stream=True) as process:
        try:
            while process.poll() is None:
                time.sleep(0.1)
        except (
            KeyboardInterrupt
        ):  # Flower's processes are in sessions of their own: none of them has noticed
            Path(env[STOP_FILE]).touch()
            deadline = time.monotonic() + STOP_SECONDS
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            if not (folder / "summary.json").exists():
                raise
    if (folder / "failure.json").exists():
        failure = json.loads((folder / "failure.json").read_text())
        kind = {"ConfigError": ConfigError, "StoppedEarly": StoppedEarly}.get(
            failure["kind"], FedGPTError
        )
        raise kind(failure["message"])
    if not (folder / "summary.json").exists():
        raise FedGPTError(
            f"Flower ended before the run did (its log is above); continue with: fedgpt run resume={folder}"
        )


def _simulation(clients: int, resources: Resources) -> list[str]:
    """Flower's simulation settings: one Ray actor per worker, each holding its share of the CPUs
    and GPUs.
    """
    settings = {
        "num-supernodes": clients,
        "client-resources-num-cpus": resources.threads,
        "init-args-num-cpus": resources.workers * resources.threads,
    }
    if gpus := len(resources.gpus):  # Ray hides them from an actor that asks for none
        # parts of one GPU: Ray puts no actor across two
        share = 1 / math.ceil(resources.workers / gpus)
        settings |= {"client-resources-num-gpus": share, "init-args-num-gpus": gpus}
    return ["--federation-config", " ".join(f"{name}={value}" for name, value in settings.items())]


@contextmanager
def _child(
    command: list[str], env: dict[str, str], home: Path, stream: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own, ended as a whole on leaving; its output goes to a log
    in `home`.
    """
    log: IO[bytes] | None = (
        None if stream else (home / f"{command[0]}-{time.monotonic_ns()}.log").open("wb")
    )
    program = str(Path(sys.executable).parent / command[0])
    process = subprocess.Popen(
        [program, *command[1:]],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end_group(process)
        if log is not None:
            log.close()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it after five seconds, and to the groups
    that it had started.
    """
    family = _descendants(process.pid)  # Flower's programs start others in sessions of their own
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    deadline = time.monotonic() + 5
    while family := [pid for pid in family if _alive(pid)]:
        if time.monotonic() > deadline:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def _descendants(pid: int) -> list[int]:
    """Ids of all processes that come from `pid`; none where there is no /proc."""
    parents = {int(path.name): _stat(int(path.name))[1] for path in Path("/proc").glob("[0-9]*")}
    found = [pid]
    for parent in found:  # grows as it goes
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def _alive(pid: int) -> bool:
    return _stat(pid)[0] not in ("", "Z")


def _stat(pid: int) -> tuple[str, int]:
    """(state, parent) of a process; ("", 0) of one that is gone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def _wait_healthy(port: int, home: Path, seconds: float = 60) -> None:
    """Return when the SuperLink answers; raises FedGPTError with the end of its log when it does
    not.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = "".join(
        path.read_text(errors="replace")[-2000:] for path in home.glob("flower-superlink-*.log")
    )
    raise FedGPTError(f"the SuperLink did not answer within {seconds:.0f} s; its log ends:\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
