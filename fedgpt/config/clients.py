"""Problems of options that depend on the clients.

Their number is known with the options if `partition.clients` is typed, and otherwise when the text
has been read. No check here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fedgpt.core.errors import ConfigError, amount
from fedgpt.core.options import RunOptions
from fedgpt.core.targets import problems_of
from fedgpt.data.prepare import Prepared
from fedgpt.server.pacing import make_pace
from fedgpt.simulate.fleet import Fleet


def pacing_problems(o: RunOptions, strategy: Any, clients: int) -> Iterator[str]:
    """Problems of the strategy under the pacing; `clients` is 0 while their number is not known."""
    paces = getattr(strategy, "paces", {"cohort"})
    if o.pace.name not in paces:
        reason = getattr(strategy, "refused_pacings", {}).get(o.pace.name, "")
        only = f"{type(strategy).__name__} supports pace={' or '.join(sorted(paces))} only"
        yield f"pace={o.pace.name}: {only}{': ' if reason else ''}{reason}"
        return
    # a probability gives no number of updates without the number of clients
    known = clients or (o.pace.clients if o.pace.rate is None else 0)
    if known and o.pace.name in ("cohort", "buffer") and hasattr(strategy, "problems"):
        pacing = make_pace(o.pace, o.seed).pacing(known)
        needed = getattr(strategy, "needed", 1)  # strategies of Flower do not have it
        limits = tuple(_limits(o, needed if needed > 1 else pacing.goal + 1, clients))
        pacing = replace(pacing, limits=limits)
        yield from problems_of("strategy", strategy, pacing)


def _limits(o: RunOptions, needed: int, clients: int) -> Iterator[str]:
    """The options that must all be raised for as many updates in a server step as are needed."""
    if o.pace.goal is not None and o.pace.goal < needed:
        yield "pace.goal"
    if o.pace.rate is not None:
        yield "pace.rate"
    elif 0 < o.pace.clients < needed:
        yield "pace.clients"
    if 0 < clients < needed:
        yield "partition.clients" if o.partition.clients else "partition.clients of partition=iid"


def number_problems(o: RunOptions, clients: int) -> Iterator[str]:
    """Options that need more clients than there are."""
    too_many = f"is above the number of clients, {clients}; lower it"
    if clients < o.attack.clients:
        yield f"attack.clients={o.attack.clients}: {too_many}"
    if o.pace.name == "cohort":  # a buffer counts updates, and one client may send several
        asked = o.pace.clients if o.pace.rate is None else 0
        for name in ("goal", "minimum"):
            number = getattr(o.pace, name) or 0
            # if it is also above pace.clients, that is reported with the options of the group
            if clients < number and not 0 < asked < number:
                yield f"pace.{name}={number}: {too_many}"


def client_problems(
    o: RunOptions, strategy: Any, prepared: Prepared, clients: Sequence[str]
) -> Iterator[str]:
    """The problems of a run with these clients and this text."""
    yield from pacing_problems(o, strategy, len(clients))
    yield from number_problems(o, len(clients))
    if o.fleet.name == "trace":
        try:
            Fleet(o.fleet, o.seed).meet(clients)
        except ConfigError as error:
            yield from error.problems
    if not getattr(strategy, "needs_root", False):
        return
    if (public := prepared.public().size) <= o.model.block_size:
        yield (
            f"corpus.public={o.corpus.public}: {amount(public, 'token')} are public, and the"
            " server's own update needs more than"
            f" model.block_size={o.model.block_size}; raise corpus.public, or lower"
            " model.block_size"
        )
