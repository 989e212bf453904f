"""Client state between jobs, in files named by run, client and job number.

A job names the earlier job whose state it starts from. So a job that is retried after a crash or a
lost reply starts from the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file

from fedgpt.core.errors import FULL, DiskFull, FedGPTError
from fedgpt.core.files import PRIVATE, replacing
from fedgpt.local.optimizer import Moments

# bytes that are not escaped in a file name
PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_- ")
MOST_NAME = 100  # largest length of a file name, in bytes; file systems allow 255
# number of model versions that a client caches, if the server sends deltas from one of them
MODELS = 4


@dataclass(frozen=True)
class ClientState:
    """The state from which a client's next job continues."""

    moments: Moments | None = None  # AdamW's moments, if local.moments=keep
    # residual of error feedback, (parameters,) float32
    residual: np.ndarray | None = None


class ClientStore:
    """The state files of one client of one run."""

    def __init__(self, root: str | Path, run: str, client: str):
        self.folder = Path(root) / safe_name(run) / safe_name(client)

    def load(self, number: int) -> ClientState | None:
        """The state after job `number`; None if there is none (first job, lost or damaged file)."""
        path = self._path(number)
        if number < 0 or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                names, steps = set(stored.keys()), int(stored.metadata()["steps"])
                tensors = {name: stored.get_tensor(name) for name in names}
        except (SafetensorError, KeyError, ValueError, TypeError):
            return None  # the caller reports a damaged file like a lost one
        moments = (
            Moments(tensors["first"], tensors["second"], steps)
            if {"first", "second"} <= names
            else None
        )
        return ClientState(moments, tensors["residual"].numpy() if "residual" in names else None)

    def save(self, number: int, state: ClientState) -> None:
        """Write the state after job `number` atomically; it is not synced to the disk."""
        tensors, steps = {}, 0
        if state.moments is not None:
            tensors |= {"first": state.moments.first.cpu(), "second": state.moments.second.cpu()}
            steps = state.moments.steps
        if state.residual is not None:
            tensors["residual"] = torch.from_numpy(state.residual)
        with self._writing(self._path(number)) as temporary:
            save_file(tensors, temporary, metadata={"steps": str(steps)})

    def load_model(self, version: int) -> np.ndarray | None:
        """The cached model of a version as the client received it; None if it is not cached."""
        try:
            with safe_open(self._model(version), framework="numpy") as stored:
                return stored.get_tensor("params")
        except (OSError, SafetensorError):
            return None

    def save_model(self, version: int, params: np.ndarray) -> None:
        """Cache a version's model; earlier versions stay, because a restarted server may refer to
        them.

        Later versions are deleted, because a restarted server makes them again.
        """
        with self._writing(self._model(version)) as temporary:
            save_numpy({"params": np.ascontiguousarray(params)}, temporary)
        kept = sorted(
            path for path in self.folder.glob("model-*.safetensors") if path <= self._model(version)
        )
        for path in set(self.folder.glob("model-*.safetensors")) - set(kept[-MODELS:]):
            path.unlink(missing_ok=True)

    def keep(self, numbers: set[int]) -> None:
        """Delete the state of all other jobs up to the newest of `numbers`."""
        if not self.folder.exists():
            return
        for path in self.folder.glob("task-*.safetensors"):
            number = int(path.stem.removeprefix("task-"))
            if number < max(numbers) and number not in numbers:
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[Path]:
        """Like `replacing`; raises FedGPTError if the system refuses, as on a full disk."""
        try:
            with replacing(path, durable=False, mode=PRIVATE) as temporary:
                yield temporary
        except (OSError, SafetensorError) as error:
            full = not isinstance(error, OSError) or error.errno in FULL
            raise (DiskFull if full else FedGPTError)(
                f"the client's state cannot be written in {self.folder} ({error}); make room there"
            ) from error

    def _model(self, version: int) -> Path:
        return self.folder / f"model-{version:08d}.safetensors"

    def _path(self, number: int) -> Path:
        # job numbers were called tasks in earlier versions, whose files are still read
        return self.folder / f"task-{number}.safetensors"


def safe_name(name: str) -> str:
    """A name as one path component; distinct names remain distinct.

    >>> safe_name("a/../b"), safe_name("")
    ('a%2f%2e%2e%2fb', '~')
    """
    encoded = name.encode("utf-8", "surrogatepass")
    escaped = "".join(chr(byte) if byte in PLAIN else f"%{byte:02x}" for byte in encoded)
    if len(escaped) > MOST_NAME:
        escaped = f"{escaped[:60]}~{hashlib.sha256(encoded).hexdigest()[:32]}"
    return escaped or "~"  # a "~" in a name is escaped, so no other name gives this
