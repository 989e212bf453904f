"""Flower's own programs on this machine: a loopback SuperLink, SuperNodes, and `flwr run`.

The ServerApp and the ClientApp are the same as on every runtime. All programs are children of this
process and are ended with it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedgpt.config.compose import to_yaml
from fedgpt.core.errors import FedGPTError, Interrupted, resume_command
from fedgpt.core.options import RunOptions
from fedgpt.flower.failure import FAILURE_FILE, raise_failure
from fedgpt.flower.grid_transport import STOP_FILE
from fedgpt.flower.processes import child
from fedgpt.flower.run_config import APP

START_SECONDS = 60.0  # seconds to wait for a SuperLink's first response
STOP_SECONDS = 60.0  # seconds to wait for a server's checkpoint after a request to stop


class LocalSuperLink:
    """A running SuperLink: start its nodes, then submit the run; `stack` ends what it starts."""

    def __init__(
        self, stack: ExitStack, home: Path, environment: Mapping[str, str], options: Sequence[str]
    ):
        """Start `flower-superlink` with its `options`; `home` is Flower's folder for this run."""
        self._stack, self._home = stack, home
        self._environment = {
            **os.environ,
            **environment,
            "FLWR_HOME": str(home),
            "PYTHONUNBUFFERED": "1",
            STOP_FILE: str(home / "stop"),
            # Flower starts its own programs by name: those beside this interpreter come first
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        self._port = _free_port()
        link = ["--insecure", "--host", "127.0.0.1", "--port", str(self._port)]
        link += ["--disable-runtime-dependency-installation", *options]
        self._start(["flower-superlink", *link], {})
        _wait_until_healthy(self._port, home)

    def start_node(self, index: int, clients: int, gpu: str | None) -> None:
        """Start the SuperNode of client `index`; `gpu` is its CUDA_VISIBLE_DEVICES, if any."""
        node = ["--insecure", "--superlink", f"127.0.0.1:{self._port}", "--max-retries", "60"]
        node += ["--host", "127.0.0.1", "--port", str(_free_port())]
        node += ["--node-config", f"partition-id={index} num-partitions={clients}"]
        self._start(
            ["flower-supernode", *node], {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        )

    def submit(self, options: RunOptions, extra: Sequence[str] = ()) -> None:
        """`flwr run` with `extra` arguments; its log goes to this process's output.

        Raises the error that the server wrote for the launcher, if any.
        """
        app = self._home / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(APP)
        # a JSON string without escapes beyond the Basic Multilingual Plane is a TOML string
        config = f"config = {json.dumps(to_yaml(options), ensure_ascii=False)}\n"
        (self._home / "run.toml").write_text(config, encoding="utf-8")
        (self._home / "config.toml").write_text(
            f'[superlink.fedgpt]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        folder, failure = Path(options.run_dir), Path(self._environment[FAILURE_FILE])
        for path in (folder / "summary.json", failure):
            path.unlink(missing_ok=True)
        command = ["flwr", "run", str(app), "fedgpt", "--stream", *extra]
        command += ["--run-config", str(self._home / "run.toml")]
        with child(command, self._environment, log=None) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.1)
            except KeyboardInterrupt:
                # Flower's processes are in separate sessions, so the signal reached none of
                # them: the file asks the server to write a checkpoint and stop
                Path(self._environment[STOP_FILE]).touch()
                deadline = time.monotonic() + STOP_SECONDS
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if not (folder / "summary.json").exists():
                    raise
        raise_failure(failure)
        _refuse_unfinished(folder)

    def _start(self, command: Sequence[str], more: Mapping[str, str]) -> None:
        log = self._home / f"{command[0]}-{time.monotonic_ns()}.log"
        self._stack.enter_context(child(command, {**self._environment, **more}, log))


@contextmanager
def local_superlink(
    run_dir: str, environment: Mapping[str, str], options: Sequence[str] = ()
) -> Iterator[LocalSuperLink]:
    """A SuperLink for one run; all processes of it and its nodes end with the block.

    Raises Interrupted after SIGINT or SIGTERM if the run in `run_dir` can be continued.
    """
    try:
        with ExitStack() as stack:
            home = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedgpt-flower-"))
            yield LocalSuperLink(stack, Path(home), environment, options)
    except KeyboardInterrupt:
        if (Path(run_dir) / "config.yaml").exists():
            raise Interrupted(run_dir) from None
        raise


def _refuse_unfinished(folder: Path) -> None:
    """Raise FedGPTError if the run in `folder` did not end, for a reason that only Flower knows."""
    if (folder / "summary.json").exists():
        return
    if not (folder / "config.yaml").exists():
        raise FedGPTError("Flower ended before the run began; its log is above")
    raise FedGPTError(
        "Flower ended before the end of the run (its log is above); continue with:"
        f" {resume_command(folder)}"
    )


def _wait_until_healthy(port: int, home: Path) -> None:
    """Return when the SuperLink responds; raises FedGPTError with the end of its log if it
    fails.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    tail = "".join(
        path.read_text(errors="replace")[-2000:] for path in home.glob("flower-superlink-*.log")
    )
    raise FedGPTError(
        f"the SuperLink did not respond within {START_SECONDS:.0f} s; its log ends:\n{tail}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
