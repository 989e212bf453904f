"""Whole runs in processes of their own: the text they train on, and what is asked of their
folders.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgpt.storage.run_folder import read_lines

TESTS = Path(__file__).parent.parent
LONG = 600.0  # seconds; bounds every wait, none is expected to come near
WRITERS = ("ann", "bob", "eve")
PARAMETERS = 7_424  # of a model that is trained in no time
ROUNDS = 6  # of the run that is stopped in different ways
STOPPED = [  # long enough rounds for a signal to meet one, and a strategy and clients that remember
    f"rounds={ROUNDS}",
    "local.steps=30",
    "strategy=fedadam",
    "local.moments=keep",
    "checkpoint.every=2",
    "runtime.workers=1",
]


@dataclass(frozen=True)
class World:
    """A folder with text, and an environment by which all of our processes are known."""

    root: Path
    env: dict[str, str]
    options: list[str]

    def fedgpt(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedgpt", *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=self.env,
            cwd=self.root,
            timeout=LONG,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def python(self, script: str) -> dict[str, Any]:
        """Run a script that fills the dictionary `told`; returns it."""
        answer = self.root / f"{uuid.uuid4().hex}.json"
        here = f"import sys\nsys.path.append({str(TESTS)!r})\nfrom support.here import run_here\n"
        whole = (
            f"import json, fedgpt\nfrom pathlib import Path\n{here}OPTIONS = {self.options!r}\ntold"
            f" = {{}}\n{script}\n"
        )
        whole += f"open({str(answer)!r}, 'w').write(json.dumps(told))\n"
        subprocess.run(
            [sys.executable, "-c", whole],
            env=self.env,
            cwd=self.root,
            timeout=LONG,
            check=True,
            stdout=subprocess.PIPE,
        )
        return json.loads(answer.read_text())

    def processes(self) -> list[int]:
        """Ids of all living processes that we started, however indirectly."""
        mark = f"FEDGPT_TEST_MARK={self.env['FEDGPT_TEST_MARK']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # gone, or not ours
                pass
        return found


def wait_until(condition: Callable[[], bool], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def shared_memory() -> set[str]:
    return (
        {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()
    )


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def untimed(folder: Path) -> list[dict[str, Any]]:
    timed = {"wall_seconds", "idle_share"}
    return [
        {k: v for k, v in r.items() if k not in timed} for r in read_lines(folder / "metrics.jsonl")
    ]


@dataclass(frozen=True)
class Finished:
    """A run as it was at its end, whatever was done to its folder later."""

    folder: Path
    out: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    files: dict[str, str]  # name -> sha256
