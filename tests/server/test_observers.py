"""Observers: one thread delivers every event, in order, and no observer can harm a run."""

from __future__ import annotations

import json
import signal
import threading
import time

import pytest
from support.fake_transport import ScriptTransport, honest
from support.harness import options, run

from fedgpt.core.errors import Interrupted
from fedgpt.core.events import MetricsReady, PacingChanged, RunClosed, VersionMade
from fedgpt.server.observers import THREAD, Observers


def changed(version: int) -> PacingChanged:
    return PacingChanged("buffer", "a test", version, seconds=0.0)


def test_one_thread_delivers_all_events_in_order_whoever_publishes():
    threads, seen = set(), []

    def observe(event):
        threads.add(threading.current_thread().name)
        seen.append(event.version if isinstance(event, PacingChanged) else event.name)

    observers = Observers([observe])
    for version in range(50):
        observers.publish(changed(version))
    other = threading.Thread(target=lambda: observers.publish(changed(50)))
    other.start()
    other.join()
    observers.close()
    assert seen == [*range(51), "closed"] and threads == {THREAD}


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_an_observer_that_raises_is_reported_once_and_left_out(caplog, error):
    seen, broken_saw = [], []

    def broken(event):
        broken_saw.append(event)
        raise error("no route to host")

    observers = Observers([broken, seen.append])
    observers.publish(changed(1))
    observers.publish(changed(2))
    observers.close()
    assert seen == [changed(1), changed(2), RunClosed()]
    assert broken_saw == [changed(1), RunClosed()], "it may free what it holds"
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert f"stopped after an error ({error.__name__}: no route to host)" in warning


def test_a_slow_observer_gets_all_events():
    seen = []

    def slow(event):
        time.sleep(0.005)
        seen.append(event)

    observers = Observers([slow])
    for version in range(60):
        observers.publish(changed(version))
    observers.close()
    assert seen == [*map(changed, range(60)), RunClosed()]


def test_an_observer_cannot_change_what_others_and_the_run_have(tmp_path):
    def meddling(event):
        if isinstance(event, VersionMade | MetricsReady):
            event.metrics["rejected"]["late"] = 99
            event.metrics.clear()

    seen = []
    clients = dict.fromkeys("abc", honest)
    done = run(options(tmp_path, rounds=3), clients, observers=[meddling, seen.append])
    calm = run(options(tmp_path / "calm", rounds=3), clients)
    assert [line["rejected"] for line in done.metrics] == [
        line["rejected"] for line in calm.metrics
    ]
    assert [e.metrics for e in seen if isinstance(e, MetricsReady)] == done.metrics


class Stuck:
    """An observer that is stuck in its first event until it is let go."""

    def __init__(self):
        self.events, self.reached, self.let_go = [], threading.Event(), threading.Event()

    def __str__(self) -> str:
        return "track=mine.Stuck"

    def __call__(self, event):
        self.events.append(event)
        self.reached.set()
        assert self.let_go.wait(60)


@pytest.fixture
def stuck():
    observer = Stuck()
    yield observer
    observer.let_go.set()


def test_an_observer_that_never_returns_is_waited_for_a_limited_time(caplog, monkeypatch, stuck):
    monkeypatch.setattr("fedgpt.server.observers.CLOSING_SECONDS", 0.05)
    seen = []
    observers = Observers([seen.append, stuck])
    for version in range(4):
        observers.publish(changed(version))
    assert stuck.reached.wait(60)
    observers.close()
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert warning.startswith("track=mine.Stuck: still at work") and "3 events are lost" in warning
    assert seen == [changed(0)], "what comes first in the list has the event"
    stuck.let_go.set()
    assert observers._ended.wait(60)
    assert stuck.events == [changed(0), RunClosed()], "one that returns after all is closed"


def test_an_interrupt_ends_the_wait_for_observers(caplog, stuck):
    observers = Observers([stuck])
    observers.publish(changed(0))
    assert stuck.reached.wait(60)
    number, main = signal.SIGINT, threading.main_thread().ident
    before = signal.signal(number, signal.default_int_handler)
    try:
        threading.Timer(0.1, signal.pthread_kill, (main, number)).start()
        observers.close()
    finally:
        signal.signal(number, before)
    assert "still at work" in caplog.text


@pytest.mark.parametrize("journal", [False, True])
def test_a_stuck_observer_keeps_no_run_from_ending(tmp_path, monkeypatch, stuck, journal):
    monkeypatch.setattr("fedgpt.server.observers.CLOSING_SECONDS", 0.05)
    clients = dict.fromkeys("abc", honest)
    done = run(options(tmp_path, rounds=3), clients, journal=journal, observers=[stuck])
    assert done.summary["versions"] == 3 and len(stuck.events) == 1
    calm = run(options(tmp_path / "calm", rounds=3), clients, journal=journal)
    assert done.summary["weights_sha256"] == calm.summary["weights_sha256"]


def test_an_interrupted_run_closes_its_observers_last_on_the_delivery_thread(tmp_path):
    calls, order = [], []

    class Transport(ScriptTransport):
        def close(self):
            time.sleep(0.05)
            order.append("transport")

    def observe(event):
        calls.append((threading.current_thread().name, event.name))
        if isinstance(event, RunClosed):
            order.append("observer")

    def dies(job):
        if job.version == 2:
            raise KeyboardInterrupt
        return honest(job)

    with pytest.raises(Interrupted):
        run(options(tmp_path), dict.fromkeys("abc", dies), kind=Transport, observers=[observe])
    assert order == ["transport", "observer"], "a slow observer keeps no worker"
    assert {thread for thread, _ in calls} == {THREAD}
    assert [name for _, name in calls].count("closed") == 1 and calls[-1][1] == "closed"
    assert "version" in {name for _, name in calls}


@pytest.mark.parametrize("journal", [False, True])
def test_a_run_delivers_every_line_that_it_writes(tmp_path, journal):
    """Observers get every line of events.jsonl and of metrics.jsonl as an event."""
    done = run(options(tmp_path, rounds=3), dict.fromkeys("abc", honest), journal=journal)
    written = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    unwritten = ("open", "metrics", "closed")
    logged = [event.as_json() for event in done.events if event.name not in unwritten]
    assert json.loads(json.dumps(logged)) == written
    complete = [dict(event.metrics) for event in done.events if isinstance(event, MetricsReady)]
    assert json.loads(json.dumps(complete)) == done.metrics
    assert done.events[0].name in ("open", "metrics"), "version 0 may be scored before it opens"
