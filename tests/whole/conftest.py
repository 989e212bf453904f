"""One folder with text and one finished run for all tests of complete runs."""

from __future__ import annotations

import os
import uuid
from typing import Any

import pytest
from support.world import (
    STOPPED,
    WRITERS,
    Finished,
    World,
    files,
    shared_memory,
    summary,
    untimed,
    wait_until,
    without_notices,
)

from fedgpt.core.files import sha256_of


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("world")
    for writer in WRITERS:
        (root / "text" / writer).mkdir(parents=True)
        for page in range(6):
            lines = (
                f"{writer} wrote on page {page}, line {n}: the river rose and fell again."
                for n in range(12)
            )
            (root / "text" / writer / f"{page}.txt").write_text("\n".join(lines))
    env = os.environ | {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(root / "flwr"),
        "FEDGPT_CACHE": str(root / "cache"),
        "FEDGPT_TEST_MARK": uuid.uuid4().hex,
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "corpus=files",
        "corpus.client=folder",
        f"corpus.path={root / 'text'}",
        "corpus.public=0.2",
        "corpus.held_out=0.2",
        "tokenizer=bytes",
        "model.n_layer=1",
        "model.n_embd=16",
        "model.n_head=2",
        "model.block_size=16",
        "local.steps=2",
        "local.batch_size=2",
        "rounds=2",
        "seed=11",
        "runtime.threads=1",
        "local.precision=fp32",
        "evaluate.sample_tokens=8",
        "evaluate.prompt=The river",
    ]
    return World(root, env, options)


@pytest.fixture(autouse=True)
def nothing_is_left(world):
    """No process and no name in /dev/shm is left after a test, whatever it did to its run."""
    before = shared_memory()
    yield
    wait_until(lambda: not world.processes(), 30)
    wait_until(lambda: shared_memory() <= before, 30)


@pytest.fixture(scope="session")
def finished(world) -> Finished:
    folder = world.root / "finished"
    done = world.fedgpt("run", *world.options, f"run_dir={folder}", "runtime.workers=2")
    assert not without_notices(done.stderr)
    content = {name: sha256_of(folder / name) for name in files(folder)}
    return Finished(folder, done.stdout, summary(folder), untimed(folder), content)


@pytest.fixture(scope="session")
def results(world, finished) -> dict[str, Any]:
    """Results of several runs through the Python API, one after the other in one process.

    The one that is not about workers has none, which is faster.
    """
    return world.python(f"""
from fedgpt.core.errors import FedGPTError
alone = fedgpt.run(*OPTIONS, "run_dir=alone", "runtime.workers=1")
results["alone"], results["folder"] = alone.summary, str(alone.folder)
reset = ("run_dir=reset", "runtime=inprocess", "local.moments=reset")
results["reset"] = fedgpt.run(*OPTIONS, *reset).summary
results["repeated"] = fedgpt.run(*OPTIONS, "run_dir=finished", "runtime.workers=1").summary
uninterrupted = ("run_dir=uninterrupted", *{STOPPED!r})
results["uninterrupted"] = fedgpt.run(*OPTIONS, *uninterrupted).summary
try:
    fedgpt.run(*OPTIONS, "run_dir=finished", "runtime.workers=1", "seed=12", "local.lr=0.001")
except FedGPTError as error:
    results["refused"] = str(error)
results["resumed"] = fedgpt.run("resume=alone").summary
try:
    fedgpt.run("resume=alone", "seed=3")
except FedGPTError as error:
    results["resumed with more"] = str(error)
opened = fedgpt.open_run("finished")
results["opened"], results["metrics"] = opened.summary, opened.metrics
results["texts"] = opened.generate("The river", tokens=12, samples=2, seed=3)
results["again"] = opened.generate("The river", tokens=12, samples=2, seed=3)
results["other"] = opened.generate("The river", tokens=12, samples=2, seed=4)
results["empty"] = opened.generate("", tokens=3)
try:
    fedgpt.open_run("text")
except FedGPTError as error:
    results["no run"] = str(error)
""")
