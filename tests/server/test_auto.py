"""strategy=auto: changes of the pacing, their records, and restarts."""

from __future__ import annotations

import heapq
from dataclasses import replace

import numpy as np
import pytest
from support import harness as scripted
from support.fake_transport import ScriptTransport, honest, reply_with
from support.harness import run_virtual

from fedgpt.aggregate.auto import Auto, updates_gained
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.core.errors import Interrupted
from fedgpt.core.messages import Job, JobTime, Observed, Plan, ServerState
from fedgpt.core.options import FleetOptions
from fedgpt.server.jobs import job_seconds


def trained(job):
    """An honest client with the tokens of as many steps as its job has."""
    return honest(job, tokens=64 * job.plan.local_steps)


FOUR = dict.fromkeys("abcd", trained)
EQUAL = FleetOptions("constant", step_seconds=[1.0])


def auto_run(folder, clients=FOUR, strategy=None, **more):
    return run_virtual(
        folder, clients, strategy or Auto(), **{"name": "cohort", "rounds": 20, **more}
    )


def switches(run):
    return [(round(about["seconds"], 1), about["pacing"]) for about in run.events_of("pacing")]


def test_the_gain_of_asynchrony():
    """max t * mean(1 / t): 33.3 s times the mean of 1 / 5.8, 1 / 7.5, 1 / 15.1 and 1 / 33.3."""
    assert updates_gained([10 * s for s in (0.58, 0.75, 1.51, 3.33)]) == pytest.approx(
        3.347, abs=1e-3
    )
    assert (
        updates_gained([7.0] * 5) == pytest.approx(1.0)
        and updates_gained([]) == updates_gained([0.0]) == 1.0
    )


def test_with_unequal_clients_the_run_becomes_asynchronous_in_the_first_round(tmp_path):
    """Two clients reply after 5.8 and 7.5 s; the other two then count as if they replied now.

    The gain t * (1 / 5.8 + 1 / 7.5 + 2 / t) / 4 reaches 1.2, the default of `gain`, at t = 9.16 s.
    The server looks again after 2 % of the longest job time, so it may be late by that; 0.1 s is a
    margin.
    """
    run = auto_run(tmp_path)
    ((seconds, pacing),) = switches(run)
    assert pacing == "buffer" and 9.16 <= seconds < 9.16 + 0.02 * 9.3 + 0.1
    assert [about["steps"] for about in run.events_of("dispatch")] == [10] * len(run.jobs)
    assert run.metrics[1]["accepted"] == 2 and all(
        record["accepted"] == 1 for record in run.metrics[2:]
    )
    assert [record["pacing"] for record in run.metrics] == [
        None,
        *["buffer"] * (len(run.metrics) - 1),
    ]
    (opened,) = (about for about in run.events_of("open"))
    assert run.summary["tokens"] >= opened["tokens_total"] == 20 * 4 * 640, (
        "the run has the tokens of 20 rounds"
    )


def test_with_equal_clients_the_run_has_the_bits_of_rounds(tmp_path):
    run = auto_run(tmp_path / "auto", fleet=EQUAL)
    assert switches(run) == [] and {record["accepted"] for record in run.metrics[1:]} == {4}
    same = run_virtual(tmp_path / "rounds", FOUR, DeltaSGD(), name="cohort", rounds=20, fleet=EQUAL)
    assert run.summary["weights_sha256"] == same.summary["weights_sha256"]


@pytest.mark.parametrize(
    "fleet", [{"up": 500.0, "down": 500.0}, {"jitter": 0.05}], ids=["slow network", "jitter"]
)
def test_delays_of_all_clients_do_not_change_the_pacing(tmp_path, fleet):
    run = auto_run(tmp_path, fleet=FleetOptions("constant", step_seconds=[1.0], **fleet), rounds=40)
    assert switches(run) == []


def test_the_pacing_does_not_oscillate(tmp_path):
    """Jitter makes rounds a fifth longer than the mean job; both pacings are about equally good."""
    run = auto_run(
        tmp_path, fleet=FleetOptions("constant", step_seconds=[1.0], jitter=0.2), rounds=40
    )
    assert len(switches(run)) <= 4


def test_the_server_does_not_wait_for_a_client_that_never_replies(tmp_path):
    """Without a deadline: the fourth client would take 1,000 s, the others take 10 s.

    The gain t * (3 / 10 + 1 / t) / 4 reaches 1.2 at t = 12.7 s.
    """
    run = auto_run(tmp_path, fleet=FleetOptions("constant", step_seconds=[1.0, 1.0, 1.0, 100.0]))
    ((seconds, pacing),) = switches(run)
    assert pacing == "buffer" and seconds < 14


def test_a_client_that_misses_the_deadline_counts_as_slow(tmp_path):
    """Three misses are a quarantine; the others are then equally fast, until the client returns."""
    fleet = FleetOptions("constant", step_seconds=[1.0, 1.0, 1.0, 100.0])
    run = auto_run(tmp_path, fleet=fleet, deadline=50.0, rounds=40)
    assert [pacing for _, pacing in switches(run)] == ["buffer", "cohort", "buffer"]
    (quarantine,) = run.events_of("quarantine")
    assert quarantine["seconds"] < switches(run)[1][0]
    assert run.server.clients.speeds["d"] <= 10 / 50


def test_in_the_rest_after_harm_the_server_does_not_wait_for_such_a_client_either():
    """Until version 30 the gain does not count. 100 s are ten times the median job time, 10 s."""
    state = ServerState(np.zeros(3, np.float32), 9, {"auto_rest": np.array(30)})
    seconds = {"a": 10.0, "b": 10.0, "c": 20.0}
    assert (
        Auto().choose_pacing(Observed("cohort", seconds, {}, waited=99.0), state).pacing == "cohort"
    )
    choice = Auto().choose_pacing(Observed("cohort", seconds, {}, waited=100.0), state)
    assert choice.pacing == "buffer" and "no reply of a client for 100.0 s" in choice.reason


def test_equal_clients_for_two_rounds_bring_back_two_rounds():
    """Two rounds of four clients are 8 versions, here 9 to 16.

    The run then stays synchronous until version 18.
    """
    alike, apart = dict.fromkeys("abcd", 10.0), {"a": 10.0, "b": 10.0, "c": 10.0, "d": 40.0}

    def after(*observed):
        state, pacing = ServerState(np.zeros(3, np.float32), 9), "buffer"
        for seconds in observed:
            choice = Auto().choose_pacing(Observed(pacing, seconds, {}), state)
            pacing = choice.pacing
            state = ServerState(state.params, state.version + 1, {**state.memory, **choice.memory})
        return pacing, choice.reason, state

    assert after(*[apart] * 20)[0] == after(*[alike] * 7)[0] == "buffer"
    assert after(*[alike] * 7, apart, *[alike] * 7)[0] == "buffer"
    pacing, reason, state = after(*[alike] * 8)
    assert pacing == "cohort" and "alike" in reason and int(state.memory["auto_rest"]) == 16 + 2
    assert [after(*[alike] * 8, *[apart] * more)[0] for more in (1, 2)] == ["cohort", "buffer"]


def test_a_client_at_work_counts_as_if_it_replied_now():
    jobs = [Job(name, 0, 0, np.zeros(1, np.float32), Plan("r", 10, 0, 1, 1), 0.0) for name in "bcd"]
    speeds = {"a": 5.0, "c": 5.0}
    late = job_seconds(10, "a", jobs, speeds, 8.0)
    assert late == {"a": 2.0, "b": 8.0, "c": pytest.approx(10 / (0.5 * 5 + 0.5 * 1.25)), "d": 8.0}
    assert job_seconds(10, "a", jobs, speeds, 1.0) == dict.fromkeys("abcd", 2.0), (
        "not faster than the slowest measured client"
    )


def test_more_clients_than_workers_do_not_make_the_run_asynchronous(tmp_path):
    """Eight clients share two workers, which are never idle; time in the queue is not job time."""

    class TwoWorkers(ScriptTransport):
        virtual, at_once = False, 2

        def send(self, jobs):
            self.free = [max(t, self.time) for t in getattr(self, "free", [0.0, 0.0])]
            for job in jobs:
                began = min(self.free)
                self.free[self.free.index(began)] = began + 1.0
                (reply,) = trained(job)
                # the start of a worker
                measured = job.number > 0 or job.client not in "ab"
                took = JobTime(1.0) if measured else JobTime(measured=False)
                heapq.heappush(
                    self._queue, (began + 1.0, next(self._order), replace(reply[1], job_time=took))
                )

    o = scripted.options(tmp_path, rounds=12)
    run = scripted.run(o, dict.fromkeys("abcdefgh", trained), Auto(), kind=TwoWorkers)
    assert run.events_of("pacing") == [] and {record["accepted"] for record in run.metrics[1:]} == {
        8
    }
    assert set(run.server.clients.speeds.values()) == {4.0}


def growing(job):
    """A client whose updates become 8 times as long; the norm limit is 10 times the median."""
    scale = 0.01 if job.number < 6 else 0.08
    rng = np.random.default_rng([*job.client.encode(), job.number])
    delta = (scale * rng.standard_normal(job.params.size)).astype(np.float32)
    return [(0.0, reply_with(job, delta, 64 * job.plan.local_steps))]


def test_growing_updates_bring_back_rounds_for_some_versions(tmp_path):
    run = auto_run(tmp_path, dict.fromkeys("abcd", growing), Auto(rest=5), rounds=30)
    changes = run.events_of("pacing")
    assert [about["pacing"] for about in changes[:3]] == ["buffer", "cohort", "buffer"]
    assert "grown" in changes[1]["reason"]
    assert changes[2]["version"] - changes[1]["version"] >= 5


def test_steps_that_undo_each_other_bring_back_rounds():
    state, strategy = ServerState(np.zeros(3, np.float32), 1), Auto()
    for _ in range(20):
        choice = strategy.choose_pacing(
            Observed("buffer", {"a": 1.0, "b": 9.0}, {"step_correlation": -0.9}), state
        )
        state = ServerState(state.params, state.version + 1, {**state.memory, **choice.memory})
        if choice.pacing == "cohort":
            break
    assert "cancel each other" in choice.reason and int(state.memory["auto_rest"]) > state.version


@pytest.mark.parametrize(
    "client, where",
    [(trained, 1), (trained, 8), (trained, 33), (growing, "rest"), (growing, "back")],
)
def test_a_restart_continues_with_the_same_pacing(tmp_path, client, where):
    """Early and late, in the rest after harm, and after the switch that follows."""
    strategy = Auto(rest=5)
    uninterrupted = auto_run(tmp_path / "uninterrupted", dict.fromkeys("abcd", client), strategy)
    versions = [about["version"] for about in uninterrupted.events_of("pacing")]
    crash_at = (
        {"rest": versions[1] + 2, "back": versions[2] + 2}[where]
        if isinstance(where, str)
        else where
    )

    def dies(job):
        if job.version == crash_at:
            raise KeyboardInterrupt
        return client(job)

    with pytest.raises(Interrupted):
        auto_run(tmp_path / "interrupted", dict.fromkeys("abcd", dies), strategy)
    again = auto_run(tmp_path / "interrupted", dict.fromkeys("abcd", client), strategy)
    assert again.summary["weights_sha256"] == uninterrupted.summary["weights_sha256"]
    assert again.server.pacing.numbers == uninterrupted.server.pacing.numbers
