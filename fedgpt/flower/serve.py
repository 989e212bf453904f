"""A run over a Flower Grid: assemble.py with Flower as its network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flwr
from flwr.serverapp import Grid

from fedgpt import assemble
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport
from fedgpt.data.partition import Shard
from fedgpt.flower.grid_transport import GridTransport
from fedgpt.flower.pool.grid import PoolGrid
from fedgpt.flower.strategy_adapter import FlowerStrategy

# seconds past the deadline after which the pool ends the worker of a client that hangs
TTL_MARGIN = 10.0
# environment variable: a file by which a launcher in another process asks a server to stop
STOP_FILE = "FEDGPT_STOP_FILE"


def serve(options: RunOptions, grid: Grid) -> dict[str, Any]:
    """Run `options` over `grid` to the last version, or continue its folder; the summary."""
    connect = partial(_connect, options, grid)
    network = assemble.Network(connect, FlowerStrategy, {"flwr": flwr.__version__})
    return assemble.serve(options, network)


def _connect(
    options: RunOptions, grid: Grid, shards: Sequence[Shard], digest: str, now: float
) -> Transport:
    """The pool knows its clients by partition; the nodes of other runtimes are asked."""
    known = None
    if isinstance(grid, PoolGrid):
        infos = [ClientInfo(shard.client, shard.size) for shard in shards]
        known = dict(zip(grid.get_node_ids(), infos, strict=True))
    deadline = options.pace.deadline
    ttl = None if deadline is None or options.clock == "virtual" else deadline + TTL_MARGIN
    stop = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
    return GridTransport(grid, len(shards), digest, known, ttl, now, stop)
