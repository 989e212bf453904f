"""What a client keeps between its jobs, in files keyed by run, client and accepted task.

A job names the task whose state it starts from, so a task that is run again, after a crash or a lost reply,
starts from the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedgpt.core.files import replacing
from fedgpt.local.optimizer import Moments


class ClientStore:
    """The state files of one client of one run."""

    def __init__(self, root: str | Path, run: str, client: str):
        self.folder = Path(root) / safe_name(run) / safe_name(client)

    def load(self, task: int) -> Moments | None:
        """Moments as they were after `task`; None where there are none (a first job, or a lost file)."""
        path = self._path(task)
        if task < 0 or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                steps = int(stored.metadata()["steps"])
                return Moments(stored.get_tensor("first"), stored.get_tensor("second"), steps)
        except (SafetensorError, KeyError, ValueError, TypeError):
            return None  # damaged is as good as lost: the caller reports it

    def save(self, task: int, moments: Moments) -> None:
        """Write the state after `task`; whole or absent, though not forced to the disk (a power cut may lose it)."""
        tensors = {"first": moments.first.cpu(), "second": moments.second.cpu()}
        with replacing(self._path(task), durable=False) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(moments.steps)})

    def keep(self, tasks: set[int]) -> None:
        """Delete the state of every other task."""
        if not self.folder.exists():
            return
        for path in self.folder.glob("task-*.safetensors"):
            if int(path.stem.removeprefix("task-")) not in tasks:
                path.unlink(missing_ok=True)

    def _path(self, task: int) -> Path:
        return self.folder / f"task-{task}.safetensors"


def safe_name(name: str) -> str:
    """A name as one path component that cannot leave its folder; distinct names stay distinct.

    >>> safe_name("a/../b")
    'a%2f%2e%2e%2fb'
    """
    if len(name) > 100:
        name = f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return re.sub(r"[^\w -]", lambda match: "".join(f"%{byte:02x}" for byte in match[0].encode()), name)
