"""One job of a client whose memory is limited, in a process of its own.

python -m support.limited_client FOLDER RESULT MEGABYTES PRIVACY
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgpt.client.limits import _data_bytes, limit_process
from fedgpt.client.policy import Policy
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.device import memory
from fedgpt.core.messages import Job, Plan

BATCH, STEPS, NOISE = 64, 3, 2.0
# a whole batch needs about 120 MB for its activations
MODEL = [
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=128"),
    *("local.precision=fp32", f"local.batch_size={BATCH}", f"local.steps={STEPS}"),
    *("runtime.device=cpu", "runtime.threads=1"),
]
SEEDED = [
    *(f"privacy.noise_multiplier={NOISE}", "privacy.target_epsilon=null", "privacy.delta=1e-4"),
    *("privacy.rng=seeded",),
]


def work_in(folder: Path, privacy: str = "none", *more: str) -> ClientWork:
    """A client of two with 200 kB of text."""
    for writer in ("ann", "bob"):
        (folder / "text" / writer).mkdir(parents=True, exist_ok=True)
        for page in range(20):
            lines = (
                f"{writer} wrote on page {page}, line {n}: the river rose." for n in range(240)
            )
            (folder / "text" / writer / f"{page}.txt").write_text("\n".join(lines))
    private = [f"privacy={privacy}", *(SEEDED if privacy == "example" else [])]
    words = [
        *("corpus=files", "corpus.client=folder", "corpus.public=0.2", "corpus.held_out=0.2"),
        *("tokenizer=bytes", f"corpus.path={folder / 'text'}", f"cache_dir={folder / 'cache'}"),
        *(f"run_dir={folder / 'run'}", *MODEL, *private, *more),
    ]
    return ClientWork(compose.load(words), str(folder / f"clients-{os.getpid()}"))


def do_job(work: ClientWork) -> tuple[dict[str, Any], np.ndarray]:
    """The header and the array of the client's first update."""
    size = work.trainer.layout.size
    start = np.random.default_rng(1).normal(0, 0.02, size).astype(np.float32)
    private = {"noise_multiplier": NOISE, "participations": 9, "delta": 1e-4}
    more = private if work.options.privacy.unit == "example" else {}
    plan = Plan("run", STEPS, 0, BATCH * 128, 10**6, **more)
    header, delta = work.train(Job("ann", 0, 0, start, plan), 0)
    return json.loads(header), delta.copy()


def limited_job(folder: Path, megabytes: int, privacy: str) -> subprocess.CompletedProcess[str]:
    """The job where that much memory is left beside the model; see `result`."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-m", "support.limited_client", folder, folder / "result.npz"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # as here, for the same bits
    }
    return subprocess.run(  # noqa: PLW1510 - the test says what its failure means
        [*map(str, command), str(megabytes), privacy],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def result(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What `do_job` returned in that process."""
    with np.load(folder / "result.npz") as stored:
        return json.loads(str(stored["header"])), stored["delta"]


def main(folder: Path, path: Path, megabytes: int, privacy: str) -> None:
    work = work_in(folder, privacy)
    assert work.trainer and work.texts.tokenizer
    share = (_data_bytes() + megabytes * 2**20) / memory()
    limit_process(Policy(device="cpu", memory=share))
    header, delta = do_job(work)
    np.savez(path, header=json.dumps(header), delta=delta)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
