"""Complete runs in separate processes: their training text, their environment and their folders."""

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
LONG = 600.0  # seconds; limits every wait, and all are expected to be much shorter
WRITERS = ("ann", "bob", "eve")
PARAMETERS = 7_424  # number of parameters of the model that these runs train
ROUNDS = 6  # rounds of the run that is stopped in different ways
# options of that run: rounds long enough for a signal to arrive in one, and a strategy and clients
# with state
STOPPED = [
    f"rounds={ROUNDS}",
    "local.steps=30",
    "strategy=fedadam",
    "local.moments=keep",
    "checkpoint.every=2",
    "runtime.workers=1",
]


def without_notices(stderr: str) -> str:
    """The text without lines such as `fedgpt: reading the text ...`, which a slow machine shows."""
    return "".join(line for line in stderr.splitlines(True) if not line.endswith(" ...\n"))


@dataclass(frozen=True)
class World:
    """A folder with text, and an environment that marks every process started from it."""

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
        """Run a script that fills the dictionary `results`; returns it."""
        answer = self.root / f"{uuid.uuid4().hex}.json"
        here = f"import sys\nsys.path.append({str(TESTS)!r})\nfrom support.here import run_here\n"
        program = (
            f"import json, fedgpt\nfrom pathlib import Path\n{here}OPTIONS = {self.options!r}\n"
            f"results = {{}}\n{script}\n"
            f"open({str(answer)!r}, 'w').write(json.dumps(results))\n"
        )
        subprocess.run(
            [sys.executable, "-c", program],
            env=self.env,
            cwd=self.root,
            timeout=LONG,
            check=True,
            stdout=subprocess.PIPE,
        )
        return json.loads(answer.read_text())

    def processes(self) -> list[int]:
        """Ids of all live processes that were started from here, directly or indirectly."""
        mark = f"FEDGPT_TEST_MARK={self.env['FEDGPT_TEST_MARK']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:  # it has ended, or belongs to another user
                pass
        return found


def wait_until(condition: Callable[[], bool], seconds: float = LONG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
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
    """A finished run as it was at its end, before a test changes its folder."""

    folder: Path
    out: str
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    files: dict[str, str]  # name -> sha256
