"""Requests that ask for something that is not there yet wait for it, a short time.

Without it a node and the server's process would ask again and again, each time at the cost of some
transactions, and would learn of a message late. Nothing else changes in Flower's protocol: whoever
asks gets the same answer, and asks again if it says that there is nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]


# a node that stops while it waits for such a request ends only after it
WAIT_SECONDS = 2.0
REPLY = "reply"  # the key of all replies


@dataclass(frozen=True)
class Wish:
    """What a request asks for: the bell's key for it, and the body of the response without it."""

    key: Hashable
    nothing: bytes


class Bell:
    """Wakes the requests that wait for a key: a node for its message, an object, or REPLY."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, set[asyncio.Event]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def listening(self, key: Hashable) -> Iterator[asyncio.Event]:
        """An event that is set when the bell rings for `key`."""
        self._loop, event = asyncio.get_running_loop(), asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[key].remove(event)
            if not self._waiting[key]:
                del self._waiting[key]

    def ring(self, key: Hashable) -> None:
        """Wake who waits for `key`; may be called by any thread."""
        if key in self._waiting and self._loop is not None:
            self._loop.call_soon_threadsafe(self._ring, key)

    def _ring(self, key: Hashable) -> None:
        for event in self._waiting.get(key, ()):
            event.set()


async def let_wait(
    app: App, scope: Event, body: bytes, receive: Receive, bell: Bell, wish: Wish
) -> list[Event]:
    """The response to a request with `body`, whose connection `receive` watches.

    If it is nothing, it is asked for again when the bell rings within WAIT_SECONDS, but not once
    the client has gone away: a message is handed out once.
    """
    with bell.listening(wish.key) as rings:  # before it asks, so that no ring is missed
        events = await _asked(app, scope, replayed(body, receive))
        if says(events, wish.nothing) and await _rung(rings, receive):
            events = await _asked(app, scope, replayed(body, receive))
    return events


def says(events: list[Event], content: bytes) -> bool:
    """Whether a response is successful and has this content."""
    found = b"".join(event.get("body", b"") for event in events)
    return bool(events) and events[0]["status"] == 200 and found == content


def replayed(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the whole body first, and then what follows it: the disconnect."""
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Event:
        return events.pop() if events else await receive()

    return replay


async def _asked(app: App, scope: Event, receive: Receive) -> list[Event]:
    events: list[Event] = []

    async def keep(event: Event) -> None:
        events.append(event)

    # a copy, because Flower keeps the request and its response there
    await app({**scope, "state": dict(scope.get("state", {}))}, receive, keep)
    return events


async def _rung(rings: asyncio.Event, receive: Receive) -> bool:
    """Whether the bell has rung in time, and the client is still there."""
    rung, gone = asyncio.create_task(rings.wait()), asyncio.ensure_future(receive())
    done, left = await asyncio.wait(
        {rung, gone}, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    for one in left:
        one.cancel()
    return done == {rung}
