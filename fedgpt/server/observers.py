"""Delivers the events of a run to its observers, from one thread, in order.

The server loop and the evaluation thread append events to a queue and continue. The delivery thread
calls every observer with one event after the other. So an observer is never called twice at the
same time, and needs no lock.

A slow observer does not delay training. It delays the observers after it in the list, and at later
events all observers, also the progress display; these events wait in memory. The end of the run
waits CLOSING_SECONDS for it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace

from fedgpt.core.events import Event, MetricsReady, Observer, RunClosed, VersionMade

THREAD = "observers"  # name of the delivery thread
# how long the end of a run waits for its observers; well within the minute that a launcher gives a
# server that it has asked to stop (flower/local_superlink.py)
CLOSING_SECONDS = 30.0
log = logging.getLogger(__name__)


class Observers:
    """The observers of a run; one that raises is reported once, gets RunClosed, and no more."""

    def __init__(self, observers: Sequence[Observer]):
        self._observers = list(observers)
        self._at_work: Observer | None = None  # the one that was called last
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = threading.Event()  # everything has been delivered
        # a daemon: an observer that never returns does not keep the process from ending
        threading.Thread(target=self._deliver, name=THREAD, daemon=True).start()

    def publish(self, event: Event) -> None:
        """Queue an event for delivery to every observer; may be called from any thread."""
        self._events.put(event)

    def close(self) -> None:
        """Deliver what is left and RunClosed; waits no longer than CLOSING_SECONDS.

        It comes last at the end of a run, so an interrupt skips nothing: it only ends the wait.
        """
        self.publish(RunClosed())
        try:  # not Thread.join: interrupted in it, Python 3.11 takes the thread for ended
            self._ended.wait(CLOSING_SECONDS)
        except KeyboardInterrupt:
            log.debug("interrupted while observers were at work")
        if not self._ended.is_set():
            log.warning(
                "%s: still at work although the run has ended; it is not waited for any longer, and"
                " %d events are lost",
                self._at_work,
                self._drop(),
            )

    def _drop(self) -> int:
        """Forget the events that wait; returns how many. Only RunClosed is left."""
        lost = 0
        with suppress(queue.Empty):
            while True:
                lost += not isinstance(self._events.get_nowait(), RunClosed)
        self.publish(RunClosed())
        return lost

    def _deliver(self) -> None:
        event: Event | None = None
        try:
            while not isinstance(event, RunClosed):
                event = self._events.get()
                for observer in self._observers:
                    self._call(observer, event)
        finally:
            self._ended.set()

    def _call(self, observer: Observer, event: Event) -> None:
        self._at_work = observer
        try:
            observer(_copied(event))
        except BaseException as error:  # SystemExit, too: it would end this thread
            self._observers = [other for other in self._observers if other is not observer]
            log.warning(
                "%s: stopped after an error (%s: %s); the run continues without it, and"
                " metrics.jsonl has every version",
                observer,
                type(error).__name__,
                error,
                exc_info=log.isEnabledFor(logging.DEBUG),
            )
            if not isinstance(event, RunClosed):
                self._dismiss(observer)

    def _dismiss(self, observer: Observer) -> None:
        """The last call of an observer that has raised, so that it can free what it holds."""
        try:
            observer(RunClosed())
        except BaseException:
            log.debug("%s: could not be closed", observer, exc_info=True)


def _copied(event: Event) -> Event:
    """The event with a table of metrics of its own, so that an observer may change it."""
    if isinstance(event, VersionMade | MetricsReady):
        return replace(event, metrics=deepcopy(event.metrics))
    return event
