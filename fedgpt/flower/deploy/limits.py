"""How often: token buckets, the refusals of an address, and a record of refusals that stays small.

All times are of the monotonic clock, in seconds.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

# an address may be refused so often at once, and so often a second from then on
REFUSALS, REFUSALS_PER_SECOND = 300, 5.0
ADDRESSES = 4096  # number of addresses that are remembered
# an address is not barred for so long after a node with an approved key called from it: a site
# may share it with an attacker, behind a router or a proxy
KNOWN_SECONDS = 600.0
# lines of one reason: so many at once, and one in so many seconds from then on
LINES, LINE_SECONDS = 20, 10.0
LONGEST = 200  # characters of what a stranger sent that are recorded


class Refused(Exception):
    """A request or connection is refused: HTTP status, a word for the record, and a sentence."""

    def __init__(self, status: int, reason: str, detail: str):
        self.status, self.reason, self.detail = status, reason, detail
        super().__init__(f"{reason}: {detail}")


class Bucket:
    """A token bucket: `burst` tokens at first, `rate` more a second, never more than `burst`."""

    __slots__ = ("_burst", "_rate", "_time", "_tokens")

    def __init__(self, rate: float, burst: float):
        self._rate, self._burst = rate, burst
        self._tokens, self._time = burst, time.monotonic()

    def left(self) -> float:
        """The number of tokens now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._time) * self._rate)
        self._time = now
        return self._tokens

    def take(self) -> bool:
        """Whether there was a token to take."""
        if self.left() < 1:
            return False
        self._tokens -= 1
        return True


def network_of(address: str) -> str:
    """What one peer can call from: its IPv4 address, or the /64 network of its IPv6 address.

    >>> network_of("::ffff:192.0.2.1"), network_of("2001:db8::1:2"), network_of("")
    ('192.0.2.1', '2001:db8::/64', '')
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


class Addresses:
    """Refusals and successes of each address, of as many addresses as a server can remember."""

    def __init__(self) -> None:
        self._refused: OrderedDict[str, Bucket] = OrderedDict()
        self._known: OrderedDict[str, float] = OrderedDict()

    def refused(self, address: str) -> bool:
        """Count a refusal; whether the address is still within its rate."""
        bucket = self._refused.pop(address, None) or Bucket(REFUSALS_PER_SECOND, REFUSALS)
        _remember(self._refused, address, bucket)
        return bucket.take()

    def known(self, address: str) -> None:
        """A node with an approved key called from this address."""
        self._known.pop(address, None)
        _remember(self._known, address, time.monotonic())

    def barred(self, address: str) -> bool:
        """Whether to refuse connections: refused too often, and no approved node calls from it."""
        bucket = self._refused.get(address)
        if bucket is None or bucket.left() >= 1:
            return False
        known = self._known.get(address)
        return known is None or time.monotonic() - known > KNOWN_SECONDS


def _remember(memory: OrderedDict[str, Any], address: str, value: object) -> None:
    memory[address] = value
    if len(memory) > ADDRESSES:
        memory.popitem(last=False)


class Record:
    """Refusals, as one line each while they are few; `counts` has the number of each reason.

    `sink` gets a mapping: time, address, node (a site's name or None), path, reason, detail, and
    `more`, the number of refusals for the same reason that had no line since the last line.
    """

    def __init__(self, sink: Callable[[dict[str, Any]], None]):
        self._sink = sink
        self.counts: Counter[str] = Counter()
        self._more: Counter[str] = Counter()
        self._buckets: dict[str, Bucket] = {}

    def add(self, refused: Refused, address: str, node: str | None = None, path: str = "") -> None:
        """Count a refusal, and record it if its reason has been rare."""
        reason = refused.reason
        self.counts[reason] += 1
        if not self._buckets.setdefault(reason, Bucket(1 / LINE_SECONDS, LINES)).take():
            self._more[reason] += 1
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "address": address,
            "node": node,
            "path": path[:LONGEST],
            "reason": reason,
            "detail": refused.detail[:LONGEST],
            "more": self._more.pop(reason, 0),
        }
        self._sink(line)
