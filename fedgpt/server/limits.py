"""What the server has learned of its clients: how long their updates usually are, and who fails
again and again.

An update may be as long as `validate.norm` times the running median of the accepted ones. The
median is that of the versions before, so that a limit never depends on who comes first. A client
whose jobs end `validate.strikes` times in a row with a miss or a rejection is in quarantine: it
gets no job for `validate.rest` rounds, then starts with a clean slate. One client at least always
stays: a federation cannot shut itself out.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping

from fedgpt.core.messages import Update
from fedgpt.core.options import ValidateOptions

REMEMBERED = 64  # norms of accepted updates: the running median is theirs
ENOUGH = 8  # norms before the median limits anything
# times the length of the global model, which no update exceeds whatever the median is
ABSOLUTE = 10.0


def norm_limit(options: ValidateOptions, norms: tuple[float, ...], model: float) -> float:
    """The longest update that a version accepts; `model` is the length of the global model.

    >>> norm_limit(ValidateOptions(norm=10), (1.0,) * 8, 3.0)
    10.0
    """
    absolute = ABSOLUTE * max(1.0, model)
    if not options.norm or len(norms) < ENOUGH:
        return absolute
    return min(absolute, options.norm * statistics.median(norms))


def clip_length(options: ValidateOptions, norms: tuple[float, ...]) -> float | None:
    """The length to which a version scales longer updates down; None: it leaves them as they
    are.
    """
    return (
        options.clip * statistics.median(norms) if options.clip and len(norms) >= ENOUGH else None
    )


def remembered(norms: tuple[float, ...], accepted: Iterable[Update]) -> tuple[float, ...]:
    """The norms to measure the next version by; the order of arrival does not matter."""
    new = sorted(
        (update.client, update.number, update.metrics["update_norm"]) for update in accepted
    )
    return (*norms, *(norm for _, _, norm in new if norm > 0))[-REMEMBERED:]


class Quarantine:
    """Who has failed how often in a row, and who is left in peace until when; the tables are the
    ledgers'.
    """

    def __init__(self, options: ValidateOptions, strikes: dict[str, int], until: dict[str, int]):
        """`strikes`: client -> failures in a row; `until`: client -> version at which it is asked
        again.
        """
        self.options, self.strikes, self.until = options, strikes, until

    def holds(self, client: str) -> bool:
        """Whether the client gets no job now."""
        return client in self.until

    def told(self, clients: Collection[str]) -> str:
        """How many of the clients it holds, for a message."""
        return f"{sum(map(self.holds, clients))} of {len(clients)} are in quarantine"

    def release(self, version: int) -> list[str]:
        """Let go who has rested long enough; returns their names."""
        free = sorted(client for client, until in self.until.items() if until <= version)
        for client in free:
            del self.until[client]
        return free

    def clear(self, client: str) -> None:
        """The client has sent a good update."""
        self.strikes.pop(client, None)

    def strike(
        self, client: str, version: int, a_round: int, clients: Mapping[str, object] | list[str]
    ) -> int | None:
        """Count a failure; the version until which the client now rests, where that was one too
        many.

        `a_round`: versions that take as many updates as clients train at once.
        """
        if not self.options.strikes or client in self.until:
            return None
        self.strikes[client] = self.strikes.get(client, 0) + 1
        others = any(other != client and other not in self.until for other in clients)
        if self.strikes[client] < self.options.strikes or not others:
            return None
        del self.strikes[client]
        self.until[client] = version + 1 + self.options.rest * a_round
        return self.until[client]
