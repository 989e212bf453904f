"""A run over a Flower Grid: assemble.py with Flower as its network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flwr
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt import assemble
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport
from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared
from fedgpt.data.shards import check_text, text_changed, text_digest
from fedgpt.flower.grid_transport import GridTransport, RunText
from fedgpt.flower.local_grid import LocalGrid
from fedgpt.flower.strategy_adapter import FlowerStrategy

# seconds after the deadline at which the pool ends the worker of a client that hangs
TTL_MARGIN = 10.0


def serve(options: RunOptions, grid: Grid) -> dict[str, Any]:
    """Run `options` over `grid` to the last version, or continue its folder; the summary."""
    connect = partial(_connect, options, grid)
    versions = {"flwr": flwr.__version__}
    # also where `flwr run` starts the run, whatever its options say of a runtime
    real_clients = isinstance(grid, HttpGrid)
    network = assemble.Network(connect, FlowerStrategy, versions, real_clients)
    return assemble.serve(options, network)


def _connect(
    options: RunOptions, grid: Grid, shards: Sequence[Shard], prepared: Prepared, now: float
) -> Transport:
    """Connect to the clients: a local grid knows them by partition, other nodes are queried."""
    known = None
    if isinstance(grid, LocalGrid):
        if grid.num_clients != len(shards):  # it was made for the text of a moment ago
            raise text_changed(options, f"{grid.num_clients} -> {len(shards)} clients")
        infos = [ClientInfo(shard.client, shard.size) for shard in shards]
        known = dict(zip(grid.get_node_ids(), infos, strict=True))
    check = partial(check_text, options, text_digest(prepared))
    text = RunText(prepared.digest, check)
    deadline = options.pace.deadline
    ttl = None if deadline is None or options.clock == "virtual" else deadline + TTL_MARGIN
    return GridTransport(grid, len(shards), text, known, ttl, now)
