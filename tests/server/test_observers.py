"""Observers: one thread delivers every event, in order, and no observer can harm a run."""

from __future__ import annotations

import json
import threading

import pytest
from support.fake_transport import honest
from support.harness import options, run

from fedgpt.core.events import MetricsReady, PacingChanged
from fedgpt.server.observers import THREAD, Observers


def changed(version: int) -> PacingChanged:
    return PacingChanged("buffer", "a test", version, seconds=0.0)


def test_one_thread_delivers_all_events_in_order_whoever_publishes():
    threads, seen = set(), []

    def observe(event):
        threads.add(threading.current_thread().name)
        seen.append(event.version)

    observers = Observers([observe])
    for version in range(50):
        observers.publish(changed(version))
    other = threading.Thread(target=lambda: observers.publish(changed(50)))
    other.start()
    other.join()
    observers.flush()
    assert seen == list(range(51)) and threads == {THREAD}
    observers.close()


def test_an_observer_that_raises_is_reported_once_and_left_out(caplog):
    seen = []

    def broken(event):
        raise OSError("no route to host")

    observers = Observers([broken, seen.append])
    observers.publish(changed(1))
    observers.publish(changed(2))
    observers.close()
    assert [event.version for event in seen] == [1, 2]
    assert caplog.text.count("gets no further events") == 1


@pytest.mark.parametrize("journal", [False, True])
def test_a_run_delivers_what_it_writes_down(tmp_path, journal):
    """Every line of events.jsonl and of metrics.jsonl is an event that observers get."""
    done = run(options(tmp_path, rounds=3), dict.fromkeys("abc", honest), journal=journal)
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    logged = [event.as_json() for event in done.events if event.name not in ("open", "metrics")]
    assert json.loads(json.dumps(logged)) == written
    complete = [dict(event.metrics) for event in done.events if isinstance(event, MetricsReady)]
    assert json.loads(json.dumps(complete)) == done.metrics
    assert done.events[0].name in ("open", "metrics"), "version 0 may be scored before it opens"
