"""The approved sites of a server's folder, as nodes of Flower's link state.

A node keeps its id for as long as its key is approved, over restarts of the link too, because the
link state is a file. A revoked key is unregistered and cannot come back: a site makes a new one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    Status,
)
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import NodeStatus

_REGISTERED = (NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE)
_LOG = logging.getLogger(__name__)


def register(state: LinkState, sites: Mapping[str, bytes]) -> dict[str, int]:
    """Make the registered nodes those of `sites`; the node of each, without a key that was revoked
    before.
    """
    nodes = {node.public_key: node for node in state.get_node_info(statuses=_REGISTERED)}
    approved = set(sites.values())
    for key, node in nodes.items():
        if key not in approved:
            state.delete_node(node.owner_aid, node.node_id)
    found = {}
    for name, key in sites.items():
        try:
            found[name] = nodes[key].node_id if key in nodes else _created(state, name, key)
        except ValueError:
            _LOG.error("the key of site %s was revoked before; the site must make a new one", name)
    return found


def _created(state: LinkState, name: str, key: bytes) -> int:
    return state.create_node(
        NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name
    )


def stop_old_runs(state: LinkState) -> None:
    """Stop runs that a former link had started: their ServerApp ended with it.

    A node with a job of such a run learns it from its next request, where Flower alone would take a
    minute to notice.
    """
    for run in state.get_run_info(statuses=[Status.STARTING, Status.RUNNING]):
        state.stop_run(run.run_id)
