"""A run over a Flower Grid: assemble.py with Flower as its network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flwr
from flwr.serverapp import Grid

from fedgpt import assemble
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport
from fedgpt.data.partition import Shard
from fedgpt.flower.grid_transport import GridTransport
from fedgpt.flower.local_grid import LocalGrid
from fedgpt.flower.strategy_adapter import FlowerStrategy

# seconds after the deadline at which the pool ends the worker of a client that hangs
TTL_MARGIN = 10.0


def serve(options: RunOptions, grid: Grid) -> dict[str, Any]:
    """Run `options` over `grid` to the last version, or continue its folder; the summary."""
    connect = partial(_connect, options, grid)
    network = assemble.Network(connect, FlowerStrategy, {"flwr": flwr.__version__})
    return assemble.serve(options, network)


def _connect(
    options: RunOptions, grid: Grid, shards: Sequence[Shard], digest: str, now: float
) -> Transport:
    """Connect to the clients: a local grid knows them by partition, other nodes are queried."""
    known = None
    if isinstance(grid, LocalGrid):
        infos = [ClientInfo(shard.client, shard.size) for shard in shards]
        known = dict(zip(grid.get_node_ids(), infos, strict=True))
    deadline = options.pace.deadline
    ttl = None if deadline is None or options.clock == "virtual" else deadline + TTL_MARGIN
    return GridTransport(grid, len(shards), digest, known, ttl, now)
