"""A run over a Flower Grid: assemble.py with Flower as its network."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import flwr
from flwr.serverapp import Grid
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt import assemble
from fedgpt.core.errors import ConfigError, amount
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.core.transport import Transport
from fedgpt.data.shards import check_text, text_changed, text_digest
from fedgpt.flower.base_delivery import BaseDelivery
from fedgpt.flower.finished import deliver
from fedgpt.flower.grid_transport import GridTransport
from fedgpt.flower.local_grid import LocalGrid
from fedgpt.flower.messages import question_content
from fedgpt.flower.nodes import Admission
from fedgpt.flower.strategy_adapter import FlowerStrategy

# seconds after the deadline at which the pool ends the worker of a client that hangs
TTL_MARGIN = 10.0


def serve(options: RunOptions, grid: Grid) -> dict[str, Any]:
    """Run `options` over `grid` to the last version, or continue its folder; the summary."""
    connection = _Connection(options, grid)
    network = assemble.Network(
        connection.connect,
        FlowerStrategy,
        {"flwr": flwr.__version__},
        # also where `flwr run` starts the run, whatever its options say of a runtime
        isinstance(grid, HttpGrid),
        connection.deliver if options.corpus.at_sites else None,
    )
    return assemble.serve(options, network)


class _Connection:
    """The server's side of a grid."""

    def __init__(self, options: RunOptions, grid: Grid):
        self._options, self._grid = options, grid
        self._transport: GridTransport | None = None

    def connect(self, text: assemble.RunText, now: float) -> Transport:
        """Connect to the clients: a local grid knows them by partition, other nodes are queried."""
        options, grid, known = self._options, self._grid, None
        if isinstance(grid, LocalGrid):
            known = _by_partition(options, grid, text)
        check = partial(check_text, options, text_digest(text.prepared))
        deadline = options.pace.deadline
        ttl = None if deadline is None or options.clock == "virtual" else deadline + TTL_MARGIN
        self._transport = GridTransport(grid, _admission(options, text), known, check, ttl, now)
        return self._transport

    def deliver(self, model: Path, run: str) -> str:
        """Send the finished model to the clients that are connected; says who has it."""
        assert self._transport is not None, "a run has been connected"
        nodes = self._transport.connected
        have = deliver(self._grid, nodes, model, run)
        missing = sorted(nodes.keys() - set(have))
        without = f"; without an answer: {', '.join(missing)}" if missing else ""
        return f"the model is at {amount(len(have), 'client')}{without}"


def _by_partition(
    options: RunOptions, grid: LocalGrid, text: assemble.RunText
) -> dict[int, ClientInfo]:
    if options.corpus.at_sites:
        raise ConfigError(options.corpus.ONLY_DEPLOYED)
    if grid.num_clients != len(text.clients):  # it was made for the text of a moment ago
        raise text_changed(options, f"{grid.num_clients} -> {len(text.clients)} clients")
    return dict(zip(grid.get_node_ids(), text.clients, strict=True))


def _admission(options: RunOptions, text: assemble.RunText) -> Admission:
    """Who may take part: the clients of the partition, or sites with their own text."""
    if not options.corpus.at_sites:
        return Admission(len(text.clients), text.prepared.digest)
    tokenizer, unit = text.prepared.tokenizer, options.privacy.unit
    assert options.pace.begin is not None, "checked with the options"
    # without init_from each site makes the same base from the seed
    sent = options.init_from is not None and text.base
    base = BaseDelivery(text.base, tokenizer.digest) if sent else None
    return Admission(
        options.pace.begin,
        tokenizer.digest,
        question_content(tokenizer.definition, base.info if base else None),
        tuple(text.clients),
        # the accounting of the server is for the clients of the start
        late=unit != "client",
        planned=unit == "example",
        base=base,
    )
