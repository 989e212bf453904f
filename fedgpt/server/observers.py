"""Delivers the events of a run to its observers, from one thread, in order.

The server loop and the evaluation thread append events to a queue and continue. The delivery thread
calls every observer with one event after the other. So an observer is never called twice at the
same time, and a slow observer delays other observers but not training.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence

from fedgpt.core.events import Event, Observer

THREAD = "observers"  # name of the delivery thread
log = logging.getLogger(__name__)


class Observers:
    """The observers of a run; an observer that raises is reported once and gets no further
    event.
    """

    def __init__(self, observers: Sequence[Observer]):
        self._observers = list(observers)
        self._events: queue.SimpleQueue[Event | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, name=THREAD, daemon=True)
        self._thread.start()

    def publish(self, event: Event) -> None:
        """Queue an event for delivery to every observer; may be called from any thread."""
        self._events.put(event)

    def flush(self) -> None:
        """Return when every event published before has been delivered."""
        if self._thread.is_alive():
            delivered = threading.Event()
            self._events.put(delivered)
            delivered.wait()

    def close(self) -> None:
        """Deliver the remaining events and end the thread."""
        self._events.put(None)
        self._thread.join()

    def _deliver(self) -> None:
        while (event := self._events.get()) is not None:
            if isinstance(event, threading.Event):
                event.set()
                continue
            for observer in list(self._observers):
                try:
                    observer(event)
                except Exception:  # no exception of a tracker may end the run
                    log.exception("an observer failed and gets no further events: %r", observer)
                    self._observers.remove(observer)
