"""Who holds the places for connections: strangers few, and nodes before strangers.

A connection is a stranger until a request on it is signed with an approved key. The oldest stranger
makes room for the next, so that those who open connections and wait do not shut out those who have
something to say. A node's connection is never ended for a stranger's.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from fedgpt.flower.deploy.limits import Addresses, Record, Refused

# most connections: of everybody, of strangers, of the strangers at one address, of one node
CONNECTIONS, STRANGERS, STRANGERS_AT_ADDRESS, OF_NODE = 512, 128, 32, 16
_RESET = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Connection:
    """One accepted connection, from before its TLS handshake to its end."""

    places: Connections
    socket: socket.socket
    address: str
    key: bytes | None = None  # of the node that was the first to sign a request on it
    task: asyncio.Task[None] | None = None  # the TLS handshake, until it ends
    transport: asyncio.Transport | None = None  # from then on

    def authenticated(self, key: bytes) -> None:
        """A request on this connection was signed with an approved key.

        Raises Refused (503) where the node has its connections already.
        """
        if self.key is None:
            self.places.known(self, key)

    def refused(self, refused: Refused) -> None:
        """Record why it is refused or ended."""
        self.places.record.add(refused, self.address)
        if self.key is None:
            self.places.addresses.refused(self.address)

    def reset(self) -> None:
        """End it at once. A stock node tries again after a reset, but not after an end of file."""
        self.places.forget(self)
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        if self.transport is not None:
            self.transport.abort()
        elif self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


class Connections:
    """All connections of a listener."""

    def __init__(self, addresses: Addresses, record: Record):
        self.addresses, self.record = addresses, record
        self._strangers: dict[Connection, None] = {}  # oldest first
        self._nodes: dict[bytes, dict[Connection, None]] = {}

    def every(self) -> list[Connection]:
        """All connections."""
        return [*self._strangers, *(one for own in self._nodes.values() for one in own)]

    def admit(self, connection: Connection) -> bool:
        """Count a new stranger; whether there is a place for it, if need be of an older one."""
        if self.addresses.barred(connection.address):
            self.record.counts["barred"] += 1
            return False
        same = [one for one in self._strangers if one.address == connection.address]
        oldest = None
        if len(same) >= STRANGERS_AT_ADDRESS:
            oldest = same[0]
        elif len(self._strangers) >= STRANGERS or len(self.every()) >= CONNECTIONS:
            oldest = next(iter(self._strangers), None)
            if oldest is None:
                self.record.counts["full"] += 1
                return False
        if oldest is not None:
            oldest.refused(Refused(0, "connections", "too many wait for a request"))
            oldest.reset()
        self._strangers[connection] = None
        return True

    def known(self, connection: Connection, key: bytes) -> None:
        """A stranger turned out to be a node; raises Refused (503) if the node has enough."""
        own = self._nodes.setdefault(key, {})
        if len(own) >= OF_NODE:
            raise Refused(503, "connections", "the node has too many connections")
        self._strangers.pop(connection, None)
        connection.key, own[connection] = key, None

    def forget(self, connection: Connection) -> None:
        """Count a connection no more."""
        self._strangers.pop(connection, None)
        if connection.key is not None and (own := self._nodes.get(connection.key)):
            own.pop(connection, None)
            if not own:
                del self._nodes[connection.key]
