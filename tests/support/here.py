"""A complete run inside the test's process (runtime=inprocess), and the options of a small one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgpt import api

# the same options on every runtime, so that the weights can be compared
SMALL = [
    "corpus=stdlib",
    "tokenizer=bytes",
    "partition=iid",
    "partition.clients=2",
    "model.n_layer=1",
    "model.n_embd=32",
    "model.n_head=2",
    "model.block_size=32",
    "rounds=3",
    "local.steps=3",
    "pace.clients=2",
    "strategy=fedadam",
    "runtime.threads=1",
    "local.precision=fp32",
    "evaluate.tokens=2048",
    "seed=11",
]


def run_here(*overrides: str) -> dict[str, Any]:
    """`fedgpt run overrides` in this process; returns the summary."""
    return api.run("runtime=inprocess", *overrides).summary


def tiny_run(folder: Path) -> list[str]:
    """Options of a small run in `folder`: two clients with one writer's text each, 3 rounds."""
    for writer in ("ann", "bob"):
        (folder / "text" / writer).mkdir(parents=True)
        for page in range(6):
            text = "\n".join(
                f"{writer} wrote on page {page}, line {n}: the river rose again." for n in range(12)
            )
            (folder / "text" / writer / f"{page}.txt").write_text(text)
    return [
        "corpus=files",
        "corpus.client=folder",
        f"corpus.path={folder / 'text'}",
        *tiny_model(),
        f"run_dir={folder / 'run'}",
        f"cache_dir={folder / 'cache'}",
    ]


def tiny_model() -> list[str]:
    """Options of very little training, on any corpus: 3 rounds of one step."""
    return [
        "corpus.public=0.2",
        "corpus.held_out=0.2",
        "tokenizer=bytes",
        "model.n_layer=1",
        "model.n_embd=16",
        "model.n_head=2",
        "model.block_size=16",
        "local.steps=1",
        "local.batch_size=2",
        "rounds=3",
        "runtime.threads=1",
        "local.precision=fp32",
        "evaluate.samples=0",
    ]
