"""What a client keeps between its jobs, in files keyed by run, client and accepted task.

A job names the task whose state it starts from, so a task that is run again, after a crash or a
lost reply, starts from the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from fedgpt.core.files import replacing
from fedgpt.local.optimizer import Moments

# bytes that a name keeps
PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- ")
MOST_NAME = 100  # bytes; file systems take 255
# versions of the model that a client keeps, where the server sends steps from one of them
MODELS = 4


@dataclass(frozen=True)
class ClientState:
    """What a client's next job goes on from."""

    moments: Moments | None = None  # of AdamW, where they are kept
    # (parameters,) float32 that compression left out, where it is fed back
    residual: np.ndarray | None = None


class ClientStore:
    """The state files of one client of one run."""

    def __init__(self, root: str | Path, run: str, client: str):
        self.folder = Path(root) / safe_name(run) / safe_name(client)

    def load(self, number: int) -> ClientState | None:
        """The state as it was after `task`; None where there is none (a first job, or a lost
        file).
        """
        path = self._path(number)
        if number < 0 or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                names, steps = set(stored.keys()), int(stored.metadata()["steps"])
                tensors = {name: stored.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, ValueError, TypeError):
            return None  # damaged is as good as lost: the caller reports it
        moments = (
            Moments(tensors["first"], tensors["second"], steps)
            if {"first", "second"} <= names
            else None
        )
        return ClientState(moments, tensors["residual"].numpy() if "residual" in names else None)

    def save(self, number: int, state: ClientState) -> None:
        """Write the state after `task`; whole or absent, though not forced to the disk (a power cut
        may lose it).
        """
        tensors, steps = {}, 0
        if state.moments is not None:
            tensors |= {"first": state.moments.first.cpu(), "second": state.moments.second.cpu()}
            steps = state.moments.steps
        if state.residual is not None:
            tensors["residual"] = torch.from_numpy(state.residual)
        with replacing(self._path(number), durable=False) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(steps)})

    def load_model(self, version: int) -> np.ndarray | None:
        """The model of a version as the client got it; None where it is not kept (any more)."""
        try:
            with safe_open(self._model(version), framework="numpy") as stored:
                return stored.get_tensor("params")
        except (OSError, SafetensorError):
            return None

    def save_model(self, version: int, params: np.ndarray) -> None:
        """Keep a version's model, and the few before it that a restarted server may think of.

        Later ones are of a future that this server has left behind.
        """
        with replacing(self._model(version), durable=False) as temporary:
            save_numpy({"params": np.ascontiguousarray(params)}, temporary)
        kept = sorted(
            path for path in self.folder.glob("model-*.safetensors") if path <= self._model(version)
        )
        for path in set(self.folder.glob("model-*.safetensors")) - set(kept[-MODELS:]):
            path.unlink(missing_ok=True)

    def keep(self, numbers: set[int]) -> None:
        """Delete the state of every other task up to the newest of these; a later one is another
        job's.
        """
        if not self.folder.exists():
            return
        for path in self.folder.glob("task-*.safetensors"):
            if (
                int(path.stem.removeprefix("task-")) < max(numbers)
                and int(path.stem.removeprefix("task-")) not in numbers
            ):
                path.unlink(missing_ok=True)

    def _model(self, version: int) -> Path:
        return self.folder / f"model-{version:08d}.safetensors"

    def _path(self, number: int) -> Path:
        return self.folder / f"task-{number}.safetensors"


def safe_name(name: str) -> str:
    """A name as one path component that cannot leave its folder; distinct names stay distinct.

    >>> safe_name("a/../b"), safe_name("")
    ('a%2f%2e%2e%2fb', '~')
    """
    whole = name.encode("utf-8", "surrogatepass")
    escaped = "".join(chr(byte) if byte in PLAIN else f"%{byte:02x}" for byte in whole)
    if len(escaped) > MOST_NAME:
        escaped = f"{escaped[:60]}~{hashlib.sha256(whole).hexdigest()[:32]}"
    return escaped or "~"  # which is escaped where a name has it
