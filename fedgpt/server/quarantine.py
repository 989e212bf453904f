"""Clients that fail again and again are left alone for a while.

A client whose jobs fail `validate.strikes` times in a row (no reply, or a rejected one) is in
quarantine: it gets no job for `validate.rest` rounds, then starts with a clean record. At least
one client always stays out of quarantine, so a federation cannot stop itself.
"""

from __future__ import annotations

from fedgpt.core.options import ValidateOptions
from fedgpt.storage.tables import Clients


class Quarantine:
    """The rule above, over the table of clients; also counts failures in a row of all clients."""

    def __init__(self, options: ValidateOptions, clients: Clients):
        self.options, self.clients = options, clients
        self.failures = 0  # failed jobs since the last accepted update, of any client

    def summary(self) -> str:
        """How many clients are in quarantine, for a message."""
        resting = sum(map(self.clients.is_resting, self.clients.ids))
        return f"{resting} of {len(self.clients)} are in quarantine"

    def succeeded(self) -> None:
        """An update was accepted: the row of failures is over."""
        self.failures = 0

    def failed(self, client: str | None, version: int, a_round: int) -> int | None:
        """Count a failed job, against `client` if it is to blame; returns the version until which
        it now rests, or None.

        `a_round`: versions that take as many updates as clients train at once.
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
