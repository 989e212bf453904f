"""Start a run on the runtime that its options name."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedgpt.config.clients import client_problems
from fedgpt.config.compose import build_strategy, changed_options, refuse_another_run, to_yaml
from fedgpt.core.errors import ConfigError
from fedgpt.core.files import write_text
from fedgpt.core.notices import saying
from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources, resources_for
from fedgpt.core.runtimes import runtime_of
from fedgpt.data.shards import load_shards, say
from fedgpt.flower.failure import FAILURE_FILE
from fedgpt.privacy.plan import make_plan
from fedgpt.storage.init_from import check_tokenizer
from fedgpt.storage.resume import check_options, checked_content
from fedgpt.storage.run_folder import RunFolder, made_folder

FLOWER_ENV = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_usage_stats_enabled": "0",
}
# By default glibc returns a freed tensor of some MB to the kernel, and the next step faults its
# pages in again. Keeping the heap saved 15 % of a training step of the nano model. Other C
# libraries ignore these names.
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}


def launch(options: RunOptions, dated: bool = False, more: Mapping[str, int] | None = None) -> None:
    """Run `options` to the end; raises the error with which the run fails, if any.

    With `dated` nobody chose the name of the run's folder: if it exists, `options.run_dir` becomes
    another name. `more`: options to be raised in the existing run, such as {"rounds": 6}.
    """
    if not more and not dated:
        refuse_another_run(options)
    with made_folder(options.run_dir, dated) as folder:
        options.run_dir = str(folder)
        _launch(options, more or {})


def _launch(options: RunOptions, more: Mapping[str, int]) -> None:
    for name, value in FLOWER_ENV.items():
        os.environ.setdefault(name, value)
    if options.corpus.at_sites:
        raise ConfigError(options.corpus.ONLY_DEPLOYED)
    changed = partial(changed_options, options=options)
    check_options(options, changed)
    # what needs torch is checked before any text is read, too
    if options.runtime.device == "cuda":
        with saying("looking for a GPU"):
            resources_for(options, clients=1)
    if options.init_from is not None:
        from fedgpt.storage.initial_weights import check_weights  # imports torch

        with saying("reading the initial weights"):
            check_weights(options)
    with saying("reading the text"):
        prepared, shards = load_shards(options, say)
    clients = len(shards)
    # before any process is started
    check_tokenizer(options, prepared.tokenizer)
    checked_content(options, prepared, shards, changed)
    runtime = runtime_of(options)
    # the clients were not known when the options were checked
    strategy = build_strategy(options.strategy, options.trusted_packages)
    names = [shard.client for shard in shards]
    if problems := [
        *runtime.problems(options, clients),
        *client_problems(options, strategy, prepared, names),
    ]:
        raise ConfigError(problems)
    if options.privacy.unit != "none":
        with saying("computing the noise"):
            make_plan(options, [shard.size for shard in shards])
    if more:
        extend(options)
    with saying("loading PyTorch"):
        resources = resources_for(options, clients)
    runtime.start(options, clients, resources, client_environment(options, resources))


def extend(options: RunOptions) -> None:
    """Write a raised length of the run in `run_dir` into its config.yaml.

    A kill at any moment leaves the old length or the new one. Raises FedGPTError while another
    process runs in this folder.
    """
    with RunFolder(options.run_dir) as folder:
        # first, because a run with summary.json is complete
        (folder.path / "summary.json").unlink(missing_ok=True)
        write_text(folder.path / "config.yaml", to_yaml(options))


def client_environment(options: RunOptions, resources: Resources) -> dict[str, str]:
    """Environment variables of the processes of a run: thread counts, paths, Flower's settings.

    They can import what this process can, such as the classes in a user's folder.
    """
    pools = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(resources.threads)
    )
    paths = {
        "PYTHONPATH": import_path(),
        "FEDGPT_STATE_DIR": f"{options.run_dir}/clients",
        FAILURE_FILE: f"{options.run_dir}/failure.json",
    }
    return {**FLOWER_ENV, **pools, **KEEP_HEAP, **paths}


def import_path() -> str:
    """A PYTHONPATH with which a child process finds every module where this process finds it.

    It is all of `sys.path`, in its order: with the folder of a user's classes alone, which the
    command line has at the end, a file there could take the place of a module of Python's own.
    """
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
