"""Start a run on its runtime: in this process for the pool, through Flower's own tools for Ray and
SuperLink.
"""

from __future__ import annotations

import os
from typing import Any

from fedgpt.config.compose import refuse_another_run, to_yaml
from fedgpt.core.options import RunOptions
from fedgpt.data.partition import partition
from fedgpt.data.prepare import prepare
from fedgpt.flower.pool.resources import Resources, resources_for

FLOWER_ENV = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_usage_stats_enabled": "0",
}
# glibc returns every freed tensor of some MB to the kernel and faults its pages in again at the
# next step; keeping the heap saved 15 % of a training step at the nano model. Other C libraries
# ignore these names.
KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}


def launch(options: RunOptions) -> None:
    """Run `options` to the end; raises the run's error where there is one."""
    refuse_another_run(options)
    for name, value in FLOWER_ENV.items():
        os.environ.setdefault(name, value)
    prepared = prepare(
        options.corpus, options.tokenizer, options.cache_dir, options.trusted_packages
    )
    clients = len(
        partition(
            prepared,
            options.partition,
            options.seed,
            options.model.block_size + 1,
            options.trusted_packages,
        )
    )
    resources = resources_for(options, clients)
    environment = client_environment(options, resources)
    if options.runtime.name == "pool":
        _launch_pool(options, clients, resources, environment)
    else:
        from fedgpt.flower.superlink import launch_flwr

        launch_flwr(options, clients, resources, environment)


def client_environment(options: RunOptions, resources: Resources) -> dict[str, str]:
    """What client processes on this machine get: where their state lives, and quiet thread
    pools.
    """
    pools = dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(resources.threads)
    )
    return {**FLOWER_ENV, **pools, **KEEP_HEAP, "FEDGPT_STATE_DIR": f"{options.run_dir}/clients"}


def _launch_pool(
    options: RunOptions, clients: int, resources: Resources, environment: dict[str, str]
) -> None:
    from flwr.app import Context, RecordDict

    from fedgpt.flower.pool.grid import PoolGrid
    from fedgpt.flower.server_app import app

    run_config: dict[str, Any] = {"config": to_yaml(options)}
    client_app = "fedgpt.flower.client_app:app"
    sizes = clients, resources.workers, resources.threads
    with PoolGrid(client_app, *sizes, run_config, environment, resources.gpus) as grid:
        app(grid, Context(grid.run.run_id, 1, {}, RecordDict(), run_config))
