"""Quarantine: clients that fail repeatedly get no jobs for some rounds.

A client whose jobs fail `validate.strikes` times in a row (no reply, or a rejected reply) is in
quarantine: it gets no job for `validate.rest` rounds, and its failures are then counted from zero.
At least one client is never in quarantine, so that the run can continue.
"""

from __future__ import annotations

from fedgpt.core.options import ValidateOptions
from fedgpt.storage.tables import Clients


class Quarantine:
    """The quarantine rule, applied to the table of clients; also counts consecutive failures of all
    clients.
    """

    def __init__(self, options: ValidateOptions, clients: Clients):
        self.options, self.clients = options, clients
        self.failures = 0  # failed jobs since the last accepted update, of any client

    def summary(self) -> str:
        """The number of clients in quarantine, for a message."""
        resting = sum(map(self.clients.is_resting, self.clients.ids))
        return f"{resting} of {len(self.clients)} are in quarantine"

    def succeeded(self) -> None:
        """Reset the count of consecutive failures: an update was accepted."""
        self.failures = 0

    def failed(self, client: str | None, version: int, a_round: int) -> int | None:
        """Count a failed job, and a strike against `client` if given; returns the version until
        which it is in quarantine, or None.

        `a_round`: number of versions in one round.
        """
        self.failures += 1
        return None if client is None else self._strike(client, version, a_round)

    def _strike(self, client: str, version: int, a_round: int) -> int | None:
        clients = self.clients
        if not self.options.strikes or clients.is_resting(client):
            return None
        strikes = clients.strike(client)
        others = any(c != client and not clients.is_resting(c) for c in clients.ids)
        if strikes < self.options.strikes or not others:
            return None
        until = version + 1 + self.options.rest * a_round
        clients.rest(client, until)
        return until
