"""How an error of a server in a process of its own gets to the user: through a file.

The launcher names the file in the environment of the processes that it starts. A server that finds
no name there, such as one that `flwr run` started, lets Flower log its errors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.core.files import write_text

FAILURE_FILE = "FEDGPT_FAILURE_FILE"  # environment variable with the path of the file


def write_failure(error: FedGPTError) -> bool:
    """Write the error for the launcher; False where nobody asked for it or it cannot be written."""
    path = os.environ.get(FAILURE_FILE)
    return path is not None and _write(error, Path(path))


def keep_failure(error: FedGPTError, folder: Path) -> None:
    """Write the error into the run's folder, if the run has one."""
    if folder.is_dir():
        _write(error, folder / "failure.json")


def _write(error: FedGPTError, path: Path) -> bool:
    problems = error.problems if isinstance(error, ConfigError) else []
    about = {"kind": type(error).__name__, "message": str(error), "problems": problems}
    try:
        write_text(path, json.dumps(about) + "\n")
    except OSError:  # the disk may be full
        return False
    return True


def raise_failure(path: Path) -> None:
    """Raise the error that `write_failure` wrote to `path`, if it wrote one."""
    if not path.exists():
        return
    about = json.loads(path.read_text(encoding="utf-8"))
    if about["kind"] == "ConfigError":
        raise ConfigError(about["problems"])
    kinds = {"StoppedEarly": StoppedEarly}
    raise kinds.get(about["kind"], FedGPTError)(about["message"])
