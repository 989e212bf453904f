"""Cohorts of real clients that go away: a version with too few updates waits for them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from support.fake_transport import Behaviour, ScriptTransport, honest
from support.harness import Outcome, options, run

from fedgpt.core.errors import StoppedEarly
from fedgpt.core.faults import Injected, injected
from fedgpt.core.messages import ClientInfo, Job, Reply
from fedgpt.core.options import CheckpointOptions, ValidateOptions
from fedgpt.storage.run_folder import read_lines

GONE, BACK = 10.0, 1000.0  # when clients go away and come back, on the run's clock


class Sites(ScriptTransport):
    """Real clients; those of AWAY lose the server from GONE to BACK."""

    virtual = False
    away = "ab"

    def available(self, client: str) -> bool:
        return client not in self.away or not GONE <= self.time < BACK

    def receive(self, timeout: float | None) -> list[Reply]:
        if not self._queue and timeout is None:
            assert self.time < BACK, "the server would wait forever"
            self.time = BACK  # a client that returns ends the wait
            return []
        return super().receive(timeout)


class WithoutB(Sites):
    away = "b"


class WithNewcomers(WithoutB):
    """Two more clients join while the first version waits for b."""

    late = ("d", "e")

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [info for info in super().clients(timeout) if info.id not in self.late]

    def newcomers(self) -> list[ClientInfo]:
        if self.time < 100.0:
            return []
        new, self.late = self.late, ()
        return [ClientInfo(name, 10_000) for name in new]


class Simulated(ScriptTransport):
    """Clients of the pool, which are always there."""

    virtual = False


def answers_later(job: Job) -> list[tuple[float, Reply]]:
    """No reply until BACK: the client got the job shortly before it went away."""
    return honest(job) if job.sent >= BACK else []


def fails_at_last(job: Job) -> list[tuple[float, Reply]]:
    """The last reply of the cohort is an error, until the others are back."""
    why = Reply(job.client, job.number, error="code 2: out of memory")
    return honest(job) if job.sent >= BACK else [(20.0, why)]


def versions_of(outcome: Outcome, client: str) -> list[int]:
    return [event["version"] for event in outcome.events_of("accept") if event["client"] == client]


def test_a_version_whose_clients_are_all_offline_at_its_deadline_waits_for_them(tmp_path, caplog):
    """The deadline may be shorter than the time for which a job waits for its client."""
    o = options(tmp_path, rounds=3, deadline=100.0)
    o.validate = ValidateOptions(strikes=1)
    outcome = run(o, dict.fromkeys("ab", answers_later), kind=Sites)
    assert outcome.version == 3 and outcome.events_of("quarantine") == []
    assert outcome.server.totals.rejected == {"no_reply": 2}
    assert outcome.accepted_until(1) == 2 and outcome.transport.time > BACK
    assert "version 1 got 0 valid updates of 2 jobs, pace.minimum=1: no_reply x2" in caplog.text
    assert "it waits for clients that are away" in caplog.text


def test_an_error_that_arrives_last_does_not_end_a_run_whose_other_clients_are_offline(tmp_path):
    def offline(job: Job) -> list[tuple[float, Reply]]:
        why = Reply(job.client, job.number, error="offline for 180 s", code="offline")
        return honest(job) if job.sent >= BACK else [(15.0, why)]

    behaviours: dict[str, Behaviour] = {"a": offline, "b": offline, "c": fails_at_last}
    outcome = run(options(tmp_path, rounds=3), behaviours, kind=Sites)
    assert outcome.version == 3
    # it was tried again until it was in quarantine, and then the others were waited for
    assert outcome.server.totals.rejected == {"offline": 2, "client_error": 3}
    assert [event["client"] for event in outcome.events_of("quarantine")] == ["c"]
    assert outcome.accepted_until(1) == 2


def test_the_updates_that_a_waiting_version_has_are_kept_and_count_once(tmp_path):
    behaviours: dict[str, Behaviour] = {"a": honest, "b": answers_later, "c": honest}
    o = options(tmp_path, rounds=2, deadline=100.0, minimum=3)
    outcome = run(o, behaviours, kind=WithoutB)
    assert outcome.version == 2 and outcome.accepted_until(1) == 3
    jobs = Counter((job.client, job.version) for job in outcome.jobs)
    assert jobs == {("b", 0): 2} | dict.fromkeys([("a", 0), ("c", 0)], 1) | {
        (client, 1): 1 for client in "abc"
    }
    assert all(versions_of(outcome, client) == [0, 1] for client in "abc")


def test_a_waiting_version_asks_no_more_clients_than_it_has_room_for(tmp_path):
    """An honest client that has joined meanwhile would get a strike for a late update."""
    behaviours: dict[str, Behaviour] = {**dict.fromkeys("acde", honest), "b": answers_later}
    o = options(tmp_path, rounds=2, deadline=100.0, minimum=3)
    o.validate = ValidateOptions(strikes=1)
    outcome = run(o, behaviours, kind=WithNewcomers)
    assert outcome.version == 2 and outcome.events_of("quarantine") == []
    assert outcome.server.totals.rejected == {"no_reply": 1}
    assert outcome.accepted_until(1) == 3


def test_another_client_takes_the_place_of_one_that_is_away(tmp_path):
    """At once, without waiting for it."""
    behaviours: dict[str, Behaviour] = {
        "a": honest,
        "b": lambda job: [],
        **dict.fromkeys("cdef", honest),
    }
    o = options(tmp_path, rounds=9, clients=2, deadline=100.0, minimum=2)
    outcome = run(o, behaviours, kind=WithoutB)
    assert outcome.version == 9 and outcome.transport.time < BACK
    assert any(job.client == "b" for job in outcome.jobs)
    assert len(outcome.accepted) == 9 * 2


def test_a_run_that_waits_for_clients_is_repeated_from_its_journal(tmp_path):
    behaviours: dict[str, Behaviour] = {"a": honest, "b": answers_later, "c": honest}
    runs = {}
    for crash in (0, 2, 3, 5):
        o = options(tmp_path / str(crash), rounds=3, deadline=100.0, minimum=3)
        o.checkpoint = CheckpointOptions(every=9)
        if crash:
            with injected(f"accepted:{crash}:raise"), pytest.raises(Injected):
                run(o, behaviours, journal=True, kind=WithoutB)
        runs[crash] = run(o, behaviours, journal=True, kind=WithoutB).params
        events = read_lines(tmp_path / str(crash) / "events.jsonl")
        taken = [(one["client"], one["number"]) for one in events if one["event"] == "accept"]
        assert len(taken) == len(set(taken)) == 9
    for params in runs.values():
        np.testing.assert_array_equal(params, runs[0])


def test_a_version_whose_coins_choose_clients_that_are_away_keeps_the_model(tmp_path, caplog):
    o = options(tmp_path, rounds=3, deadline=100.0, rate=1.0)
    outcome = run(o, dict.fromkeys("ab", answers_later), kind=Sites)
    assert outcome.version == 3 and outcome.accepted_until(1) == 0
    assert outcome.accepted_until(2) == 2
    assert "version 1 leaves the model as it is" in caplog.text


@pytest.mark.parametrize("kind", [Simulated, ScriptTransport])
def test_too_few_updates_of_clients_that_are_there_stop_the_run(tmp_path, kind):
    with pytest.raises(StoppedEarly, match=r"version 1 got 0 valid updates of 2 jobs, pace\.min"):
        run(options(tmp_path), dict.fromkeys("ab", fails_at_last), kind=kind)
