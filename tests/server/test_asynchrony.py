"""The loop with pace=buffer on the virtual clock: staleness, DyLU, deadlines, resume, replay."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from support.fake_transport import honest
from support.harness import LatePool, run_virtual

from fedgpt.aggregate.delayed_nesterov import DelayedNesterov
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.fedasync import FedAsync
from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import FedGPTError, Interrupted, StoppedEarly
from fedgpt.core.messages import JobTime, Reply
from fedgpt.core.options import EvaluateOptions, FleetOptions
from fedgpt.server.jobs import JobPlanner
from fedgpt.simulate.virtual_clock import VirtualTransport

FOUR = dict.fromkeys("abcd", honest)
# the first arrivals of the published workers, whose jobs of 10 local steps take 5.8, 7.5, 15.1 and
# 33.3 s: (seconds, client, staleness)
GOLDEN = [
    (5.8, 0, 0),
    (7.5, 1, 1),
    (11.6, 0, 1),
    (15.0, 1, 1),
    (15.1, 2, 4),
    (17.4, 0, 2),
    (22.5, 1, 2),
    (23.2, 0, 1),
    (29.0, 0, 0),
    (30.0, 1, 2),
    (30.2, 2, 5),
    (33.3, 3, 11),
    (34.8, 0, 3),
]


def accepted(run):
    return run.events_of("accept")


def test_the_published_workers_arrive_as_in_the_golden_trace(tmp_path):
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=96)
    trace = [(a["seconds"], "abcd".index(a["client"]), a["staleness"]) for a in accepted(run)]
    for (seconds, client, tau), golden in zip(trace, GOLDEN, strict=False):
        assert (pytest.approx(seconds), client, tau) == golden
    assert run.summary["virtual_seconds"] == pytest.approx(241.6)  # 16 jobs of 15.1 s
    assert np.mean([tau for *_, tau in trace]) == 2.9375
    histogram = {0: 5, 1: 32, 2: 24, 3: 12, 4: 5, 5: 6, 6: 5, 11: 2, 12: 2, 13: 2, 14: 1}
    assert Counter(tau for *_, tau in trace) == histogram
    steps = Counter(a["client"] for a in accepted(run))
    assert [10 * steps[c] for c in "abcd"] == [410, 320, 160, 70]


def test_fedbuff_counts_staleness_in_flushes(tmp_path):
    run = run_virtual(tmp_path, FOUR, FedBuff(), rounds=24, goal=4)
    assert Counter(a["staleness"] for a in accepted(run)) == {0: 46, 1: 39, 2: 5, 3: 4, 4: 2}


def test_dylu_makes_jobs_equally_long(tmp_path):
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=170, local={"steps": 50}, dylu=True)
    steps = {about["client"]: about["steps"] for about in run.events_of("dispatch")}
    assert [steps[c] for c in "abcd"] == [50, 38, 19, 8]  # after one measured job each
    late = [a["staleness"] for a in accepted(run)][-100:]
    assert Counter(late).most_common(1)[0][0] == 3 and max(late) <= 4  # k - 1 nearly everywhere


@pytest.mark.parametrize(
    "steps, expected",
    [
        (10, [10, 7, 3, 1]),
        (30, [30, 23, 11, 5]),
        (100, [100, 77, 38, 17]),
        (128, [128, 98, 49, 22]),
        (500, [500, 386, 192, 87]),
    ],
)
def test_dylu_steps_are_proportional_to_speed(tmp_path, steps, expected):
    """floor(steps * 0.58 / s) for clients of s = 0.58, 0.75, 1.51 and 3.33 seconds per step."""
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=30, local={"steps": steps}, dylu=True)
    last = {about["client"]: about["steps"] for about in run.events_of("dispatch")}
    assert [last[c] for c in "abcd"] == expected


def test_dylu_with_equal_speeds_changes_nothing(tmp_path):
    equal = FleetOptions("constant", step_seconds=[1.0])
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=20, fleet=equal, dylu=True)
    assert {about["steps"] for about in run.events_of("dispatch")} == {10}


@pytest.mark.parametrize(
    "strategy", [DeltaSGD(), FedAsync(), FedBuff(), DelayedNesterov(period=4)], ids=lambda s: s.name
)
def test_the_order_of_computation_changes_no_bit(tmp_path, strategy):
    digests = {
        run_virtual(tmp_path / str(seed), FOUR, strategy, rounds=40, shuffle=seed).summary[
            "weights_sha256"
        ]
        for seed in range(4)
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    "strategy", [DeltaSGD(), FedAsync(), DelayedNesterov(period=4)], ids=lambda s: s.name
)
@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize("crash_at", [3, 20, 33])
def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path, strategy, every, crash_at):
    """The jobs in flight of a stopped server are sent again, from their base versions."""
    uninterrupted = run_virtual(
        tmp_path / "uninterrupted", FOUR, strategy, rounds=40, checkpoint=every
    )

    def dies(job):
        if job.version == crash_at:
            raise KeyboardInterrupt
        return honest(job)

    with pytest.raises(Interrupted):
        run_virtual(
            tmp_path / "interrupted",
            dict.fromkeys("abcd", dies),
            strategy,
            rounds=40,
            checkpoint=every,
        )
    again = run_virtual(tmp_path / "interrupted", FOUR, strategy, rounds=40, checkpoint=every)
    wall = {"wall_seconds"}
    assert {k: v for k, v in again.summary.items() if k not in wall} == {
        k: v for k, v in uninterrupted.summary.items() if k not in wall
    }
    assert [{k: v for k, v in r.items() if k not in wall} for r in again.metrics] == [
        {k: v for k, v in r.items() if k not in wall} for r in uninterrupted.metrics
    ]


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("most", [None, 3])
def test_replaying_the_events_of_a_run_gives_its_weights(tmp_path, monkeypatch, most, warm):
    """Also with DyLU, whose steps follow from measured times; stale updates are not measured.

    Not `warm`: the first job of each client has no measured time, as on the pool.
    """
    rough = FleetOptions("lognormal", median=1.0, spread=1.0, jitter=0.3)
    if not warm:
        arrival = VirtualTransport._arrival

        def untimed(transport, event):
            reply = arrival(transport, event)
            return (
                replace(reply, job_time=JobTime(measured=False))
                if reply and event.number == 0
                else reply
            )

        monkeypatch.setattr(VirtualTransport, "_arrival", untimed)
    first = run_virtual(
        tmp_path / "a", FOUR, DeltaSGD(), rounds=60, fleet=rough, dylu=True, max_staleness=most
    )
    monkeypatch.undo()
    fleet = FleetOptions("replay", path=str(tmp_path / "a" / "events.jsonl"))
    again = run_virtual(
        tmp_path / "b", FOUR, DeltaSGD(), rounds=60, fleet=fleet, dylu=True, max_staleness=most
    )
    assert again.summary["rejected"] == first.summary["rejected"]
    assert most is None or first.summary["rejected"]["stale"] > 0
    assert again.summary["weights_sha256"] == first.summary["weights_sha256"]
    order = [(a["client"], a["number"]) for a in accepted(first)]
    assert [(a["client"], a["number"]) for a in accepted(again)] == order


def test_a_record_too_short_for_the_run_is_an_error(tmp_path):
    run_virtual(tmp_path / "a", FOUR, DeltaSGD(), rounds=10)
    fleet = FleetOptions("replay", path=str(tmp_path / "a" / "events.jsonl"))
    with pytest.raises(FedGPTError, match="cannot advance"):
        run_virtual(tmp_path / "b", FOUR, DeltaSGD(), rounds=30, fleet=fleet)


def test_a_stale_update_changes_no_speed(tmp_path, monkeypatch):
    measured = []
    measure = JobPlanner.measure

    def noted(planner, job, *about):
        measured.append(job.client)
        return measure(planner, job, *about)

    monkeypatch.setattr(JobPlanner, "measure", noted)
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=60, max_staleness=4)
    assert run.summary["rejected"]["stale"] > 0
    assert len(measured) == len(run.events_of("accept"))


def test_updates_above_max_staleness_are_dropped_with_a_reason(tmp_path):
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=60, max_staleness=4)
    assert max(a["staleness"] for a in accepted(run)) == 4
    assert set(run.summary["rejected"]) == {"stale"}
    assert run.events_of("quarantine") == [], "a client that is too slow has not failed"
    free = run_virtual(tmp_path / "free", FOUR, DeltaSGD(), rounds=60)
    assert max(a["staleness"] for a in accepted(free)) > 4


def test_no_job_starts_from_the_client_state_of_a_dropped_update(tmp_path):
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=60, max_staleness=4)
    taken = {(a["client"], a["number"]) for a in accepted(run)}
    assert all(j.plan.state_job == -1 or (j.client, j.plan.state_job) in taken for j in run.jobs)


def test_a_job_without_a_reply_is_given_up_and_its_client_gets_another(tmp_path):
    slow = FleetOptions("constant", step_seconds=[1.0, 1.0, 1.0, 100.0])
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=30, fleet=slow, deadline=25.0)
    given_up = run.events_of("reject")
    assert {about["client"] for about in given_up} == {"d"} and {
        about["code"] for about in given_up
    } == {"no_reply"}
    assert len({about["number"] for about in given_up}) == len(given_up) >= 2


def test_clients_that_only_fail_stop_the_run(tmp_path):
    def broken(job):
        return [(0.0, Reply(job.client, job.number, error="code 2: no text"))]

    with pytest.raises(StoppedEarly, match="40 jobs in a row failed: client_error x40"):
        run_virtual(tmp_path, dict.fromkeys("abcd", broken), DeltaSGD(), rounds=10)


def test_dropouts_and_windows_delay_and_never_block(tmp_path):
    fleet = FleetOptions("published", dropout=0.3, window=[100.0, 60.0], jitter=0.2)
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=60, fleet=fleet)
    lost = Counter(about["detail"] for about in run.events_of("reject"))
    assert run.summary["versions"] == 60 and {"dropped out", "went away"} <= set(lost)


def test_with_all_clients_away_the_server_waits_for_the_first_to_return(tmp_path):
    fleet = FleetOptions("constant", step_seconds=[1.0], window=[15.0, 500.0])
    run = run_virtual(tmp_path, dict.fromkeys("ab", honest), DeltaSGD(), rounds=4, fleet=fleet)
    assert run.summary["versions"] == 4 and run.summary["virtual_seconds"] > 500


def test_downloads_and_uploads_take_time(tmp_path):
    plain = run_virtual(tmp_path / "a", FOUR, DeltaSGD(), rounds=8, fleet=FleetOptions("published"))
    heavy = FleetOptions("published", up=1000.0, down=1000.0)
    slow = run_virtual(tmp_path / "b", FOUR, DeltaSGD(), rounds=8, fleet=heavy)
    first = accepted(slow)[0]
    sent = slow.jobs[0]
    expected = 5.8 + 1000e-6 * (
        sent.params.nbytes + slow.transport.sizes[first["client"], first["number"]]
    )
    assert first["seconds"] == pytest.approx(expected)
    assert slow.summary["virtual_seconds"] > plain.summary["virtual_seconds"]


def test_at_most_one_more_model_is_kept_than_jobs_in_flight(tmp_path):
    """A snapshot that is being written must not keep versions that no job started from."""
    vectors: dict[int, weakref.ref] = {}
    most = 0

    def client(job):
        nonlocal most
        vectors.setdefault(job.version, weakref.ref(job.params))
        most = max(
            most, sum(vector() is not None for version, vector in vectors.items() if version)
        )
        return honest(job)

    class Forgetful(LatePool):
        def send(self, jobs):
            super().send(jobs)
            self.jobs.clear()

    unscored = EvaluateOptions(every=0, samples=0)
    run = run_virtual(
        tmp_path,
        dict.fromkeys("abcd", client),
        DeltaSGD(),
        rounds=60,
        evaluate=unscored,
        pool=Forgetful,
    )
    assert len(vectors) > 40 and max(record["bases"] for record in run.metrics) == 3, (
        "without the newest"
    )
    assert most <= 4 + 1


def test_a_base_version_is_freed_after_its_last_job(tmp_path):
    vectors: dict[int, weakref.ref] = {}  # version -> what its jobs began from
    flying: dict[str, int] = {}  # client -> version
    counts = []

    def client(job):
        vectors.setdefault(job.version, weakref.ref(job.params))
        flying[job.client] = job.version  # this replaces the client's previous job
        alive = {v for v, vector in vectors.items() if vector() is not None}
        assert alive - {0} == set(flying.values()) - {0}, (
            "version 0 may still be with the evaluation thread"
        )
        counts.append(len(set(flying.values())))
        return honest(job)

    class Forgetful(LatePool):
        def send(self, jobs):
            super().send(jobs)
            self.jobs.clear()

    unscored = EvaluateOptions(every=0, samples=0)  # except the first and the last version
    clients = dict.fromkeys("abcd", client)
    run = run_virtual(
        tmp_path, clients, DeltaSGD(), rounds=60, checkpoint=0, evaluate=unscored, pool=Forgetful
    )
    assert (
        len(counts) == 4 + 59 and max(counts) == 4 and len(vectors) == 60 and vectors[0]() is None
    )
    # a record is made before the client that has finished gets a job on the newest version
    assert [record["bases"] for record in run.metrics[1:60]] == [count - 1 for count in counts[4:]]


def test_the_length_of_a_run_may_be_given_in_tokens(tmp_path):
    # a job has 512 tokens; the number of rounds has no effect
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=3, tokens=10_000)
    assert run.summary["tokens"] == 10_240 and run.summary["versions"] == 20
    assert run.jobs[-1].plan.tokens_total == 10_000
    assert "loss" in run.metrics[-1]


def test_updates_within_the_grace_are_included(tmp_path):
    fleet = FleetOptions("constant", step_seconds=[1.0, 1.05, 1.1, 3.0])
    run = run_virtual(tmp_path, FOUR, FedBuff(), rounds=5, fleet=fleet, goal=1, grace=1.5)
    assert run.metrics[1]["accepted"] == 3


def test_simultaneous_arrivals_are_ordered_by_client(tmp_path):
    equal = FleetOptions("constant", step_seconds=[1.0])
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=8, fleet=equal, shuffle=5)
    assert [a["client"] for a in accepted(run)] == list("abcdabcd")
