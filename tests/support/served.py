"""A deployment on this machine as its users run it: `fedgpt server` and a process for each site."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.link import free_port
from support.superlink import node_process
from support.world import wait_until

from fedgpt.flower.deploy.folder import init
from fedgpt.flower.deploy.keys import approve
from fedgpt.flower.deploy.kit import make_request, read_kit
from fedgpt.flower.processes import _descendants
from fedgpt.storage.run_folder import read_lines

LONG = 300.0  # seconds; bounds every wait, and the machine may be busy
LINK, SERVER = "fedgpt.flower.deploy.link", "flwr-serverapp"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class Served:
    """A server's folder with two sites; `start` runs `fedgpt server` in it."""

    root: Path
    names: tuple[str, ...] = ("north", "south")
    status_port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.folder = self.root / "server"
        init(self.folder, ["127.0.0.1"], free_port())
        for name in self.names:
            make_request(name, self.root)
            approve(self.folder, self.root / f"{name}.request", self.root)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "fedgpt", *words]

    def arguments(self, *words: str) -> list[str]:
        ports = ["--host", "127.0.0.1", "--status-port", str(self.status_port)]
        return self.command("server", str(self.folder), *ports, *words)

    @contextmanager
    def server(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A running `fedgpt server DIR words`; its output is appended to server.log."""
        log = (self.root / "server.log").open("a")
        environment = {**os.environ, **ENVIRONMENT}
        with (
            log,
            subprocess.Popen(
                self.arguments(*words), stdout=log, stderr=log, text=True, env=environment
            ) as process,
        ):
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    try:
                        process.wait(90)
                    except subprocess.TimeoutExpired:
                        process.kill()

    def fedgpt(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Another command of the operator."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=LONG, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    @contextmanager
    def sites(
        self, own: Callable[[str], Mapping[str, Any]] | None = None, plain: bool = False
    ) -> Iterator[list[subprocess.Popen[str]]]:
        """A persistent client for each site, with the node configuration `own(name)`, or that of
        its partition; `plain`: without TLS.
        """
        with ExitStack() as nodes:
            yield [
                nodes.enter_context(
                    node_process(
                        self._about(name, own(name) if own else self._partition(number), plain)
                    )
                )
                for number, name in enumerate(self.names)
            ]

    def _partition(self, number: int) -> dict[str, Any]:
        partition = {"partition-id": number, "num-partitions": len(self.names)}
        return {**partition, "state-dir": str(self.root / "state")}

    def _about(self, name: str, config: Mapping[str, Any], plain: bool) -> dict[str, Any]:
        kit = read_kit(self.root / f"{name}.kit")
        private = kit.private_key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ).decode()
        about = {"address": kit.approval.address, "app": "fedgpt.flower.client_app:app"}
        return {**about, "key": private, "config": dict(config)} | (
            {} if plain else {"ca": kit.approval.ca}
        )

    def log(self) -> str:
        return (self.root / "server.log").read_text()

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of the server's status port; (0, "") if nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except urllib.error.URLError:
            return 0, ""

    def status(self) -> dict[str, Any]:
        done = self.fedgpt("status", str(self.folder), "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def acts(self) -> list[dict[str, Any]]:
        """The supervisor's lines of audit.jsonl."""
        return [line for line in read_lines(self.folder / "audit.jsonl") if "act" in line]


def descendant(process: subprocess.Popen[str], word: str) -> int:
    """The one process below another that was started as `word`, a program or a module."""
    found = []
    for pid in _descendants(process.pid):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if word in words[2:3] or Path(words[1]).name == word:
            found.append(pid)
    (one,) = found
    return one


def version_of(run_dir: Path) -> int:
    """The newest version of a run."""
    return max((line["version"] for line in read_lines(run_dir / "metrics.jsonl")), default=-1)


def reached(run_dir: Path, version: int) -> None:
    wait_until(lambda: version_of(run_dir) >= version, LONG)


def ended(process: subprocess.Popen[str], seconds: float = LONG) -> int:
    """The exit code of a process that ends by itself."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, "it does not end"
        time.sleep(0.05)
    return process.returncode
