"""Coverage-guided fuzzing of what a restart reads: checkpoints and the log.

It needs `pip install atheris`:

    PYTHONPATH=tests python tests/fuzz/fuzz_checkpoint.py -max_total_time=60

The digest of a checkpoint is made to fit, so that its reader sees the damage; what is read must be
undamaged or refused.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedgpt.storage"]):
    import numpy as np

    from fedgpt.core.errors import FedGPTError
    from fedgpt.core.files import sha256_of
    from fedgpt.core.messages import Reply, ServerState
    from fedgpt.storage.checkpoint import Checkpoints, Snapshot
    from fedgpt.storage.journal import Entry, Journal
    from fedgpt.storage.tables import Clients, RunIdentity, VersionLine

logging.disable(logging.WARNING)
FOLDER = Path(tempfile.mkdtemp(prefix="fedgpt-fuzz-"))
CHECKPOINT, LOG = FOLDER / "version-00000004.safetensors", FOLDER / "version-00000004.log"


def prepare() -> tuple[bytes, bytes]:
    """The bytes of an undamaged checkpoint and of an undamaged log."""
    checkpoints = Checkpoints(FOLDER, 2)
    state = ServerState(np.arange(8, dtype=np.float32), 4, {"momentum": np.ones(8, np.float32)})
    clients, extra = Clients({"accepted": {"a": 1}}), {"base/3": np.zeros(8, np.float32)}
    line = VersionLine({"version": 4})
    checkpoints.save(Snapshot(state, RunIdentity("run"), line, clients=clients, extra=extra))
    checkpoints.close()
    journal = Journal(FOLDER)
    journal.begin(4)
    journal.append(Entry("send", jobs=(("a", 2),), times=(1.0,), clients=1))
    journal.append(
        Entry("receive", replies=(Reply("a", 2, "{}", np.arange(4, dtype=np.float32)),), clients=1)
    )
    journal.close()
    return CHECKPOINT.read_bytes(), LOG.read_bytes()


def one(data: bytes) -> None:
    """Change, cut or replace what is read."""
    source = atheris.FuzzedDataProvider(data)
    for path, undamaged in ((CHECKPOINT, GOOD[0]), (LOG, GOOD[1])):
        content = bytearray(undamaged)
        for _ in range(source.ConsumeIntInRange(0, 4)):
            content[source.ConsumeIntInRange(0, len(content) - 1)] = source.ConsumeIntInRange(
                0, 255
            )
        if source.ConsumeBool():
            content = content[: source.ConsumeIntInRange(0, len(content))] + source.ConsumeBytes(16)
        path.write_bytes(content)
    CHECKPOINT.with_suffix(".sha256").write_text(sha256_of(CHECKPOINT) + "\n")
    checkpoints = Checkpoints(FOLDER, 2)
    try:
        checkpoints.load()
    except FedGPTError:
        pass
    finally:
        checkpoints.close()
    assert len(list(Journal(FOLDER).read(4))) <= 2


GOOD = prepare()
if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
