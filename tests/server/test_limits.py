"""Limits on updates: running median of norms, quarantine, bad updates without an effect."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from support.fake_transport import Behaviour, ScriptTransport, honest, reply_with
from support.harness import SIZE, options, run

from fedgpt.aggregate.centred_clip import CentredClip
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fltrust import FLTrust
from fedgpt.aggregate.geometric_median import GeometricMedian
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.norm_clip import NormClip
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.config import compose
from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Job, Plan, Reply, ServerState, Update
from fedgpt.core.options import RunOptions, ValidateOptions
from fedgpt.server.collector import Collectors, UpdateCollector
from fedgpt.server.limits import ENOUGH, clip_length, norm_limit, remembered
from fedgpt.server.privacy import Privacy
from fedgpt.server.quarantine import Quarantine
from fedgpt.storage.tables import Clients
from fedgpt.update.compress import codec_of
from fedgpt.update.wire import compress, header_of

RULES = [
    FedAvg(),
    Median(),
    TrimmedMean(),
    Krum(attackers=1),
    GeometricMedian(),
    NormClip(),
    CentredClip(),
    FLTrust(),
]
HONEST: dict[str, Behaviour] = dict.fromkeys("abcdef", honest)


def test_the_limit_is_a_multiple_of_the_running_median():
    o = ValidateOptions(norm=10.0, clip=2.0)
    few, many = (3.0,) * 7, (1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 100.0)
    assert norm_limit(o, few, 2.0) == 20.0 and clip_length(o, few) is None
    assert norm_limit(o, many, 50.0) == 30.0 and clip_length(o, many) == 6.0
    assert norm_limit(o, many, 0.5) == 10.0, "never above ten times the model, or ten"
    assert norm_limit(ValidateOptions(norm=0.0), many, 50.0) == 500.0


def test_norms_are_remembered_in_an_order_that_does_not_depend_on_arrival():
    def accepted(client, norm):
        return Update(client, 0, 0, np.empty(0, np.float32), 1, {"update_norm": norm})

    one, two = accepted("a", 1.0), accepted("b", 2.0)
    assert remembered((0.5,), [one, two]) == remembered((0.5,), [two, one]) == (0.5, 1.0, 2.0)
    assert remembered((0.5, *(2.0,) * 63), [one]) == (*(2.0,) * 63, 1.0), "the last 64"
    assert remembered((), [accepted("a", 0.0)]) == (), "zero updates would make the limit zero"


def two_clients() -> Clients:
    clients = Clients()
    clients.meet(["a", "b"])
    return clients


def test_three_failures_in_a_row_are_a_quarantine():
    clients = two_clients()
    quarantine = Quarantine(ValidateOptions(strikes=3, rest=2), clients)
    assert quarantine.failed("a", 5, 1) is None
    clients.accept(Update("a", 0, 0, np.zeros(1, np.float32), 1), 1.0)
    assert [quarantine.failed("a", 5, 4) for _ in range(3)] == [None, None, 5 + 1 + 2 * 4]
    assert clients.is_resting("a") and not clients.is_resting("b")
    assert quarantine.summary() == "1 of 2 are in quarantine"
    assert clients.end_rests(13) == [] and clients.end_rests(14) == ["a"]
    assert not clients.is_resting("a") and clients.as_json()["columns"]["strikes"] == {}


def test_an_accepted_update_resets_the_count_of_failures_of_all_clients():
    quarantine = Quarantine(ValidateOptions(), two_clients())
    quarantine.failed("a", 0, 1)
    quarantine.failed(None, 0, 1)
    assert quarantine.failures == 2
    quarantine.succeeded()
    assert quarantine.failures == 0


def test_the_last_client_is_never_quarantined():
    clients = two_clients()
    quarantine = Quarantine(ValidateOptions(strikes=1, rest=9), clients)
    assert quarantine.failed("a", 0, 1) == 10
    assert quarantine.failed("b", 0, 1) is None and not clients.is_resting("b")


def spoiled(spoil, **header):
    """A client whose honest update is changed: its array by `spoil`, its header by fields."""

    def client(job):
        ((seconds, reply),) = honest(job)
        about = {**json.loads(reply.header), **header}
        return [(seconds, replace(reply, payload=spoil(reply.payload), header=json.dumps(about)))]

    return client


def resent(spoil, **how):
    """As `spoiled`, with the digest of what is sent."""

    def client(job):
        ((seconds, reply),) = honest(job)
        return [(seconds, reply_with(job, spoil(reply.payload), **how))]

    return client


def read_as(code):
    """A reply that could not be read, with a code; flower/test_messages.py has such bytes."""
    return lambda job: [(1.0, Reply(job.client, job.number, error="no array", code=code))]


def same(array):
    return array


GARBAGE = {  # reason code -> a client whose replies are rejected with it
    "bad_encoding": lambda job: [(1.0, replace(honest(job)[0][1], header="{not json"))],
    "missing_key": read_as("missing_key"),
    "extra_key": read_as("extra_key"),
    "pickle_refused": read_as("pickle_refused"),
    "too_large": spoiled(same, padding="x" * 100_000),
    "wrong_run": spoiled(same, run="another"),
    "wrong_sender": spoiled(same, client="a"),
    "unknown_job": spoiled(same, task=10**6),
    "size_mismatch": resent(lambda array: array[:-1]),
    "wrong_shape": resent(lambda array: array.reshape(-1, 1)),
    "wrong_dtype": resent(lambda array: array.astype(np.float64)),
    "digest_mismatch": spoiled(lambda array: array + np.float32(1)),
    "bad_num_tokens": resent(same, tokens=10**13),
    "bad_metric": resent(same, accuracy=float("nan")),
    "non_finite": resent(lambda array: array * np.float32(np.nan)),
    "norm_limit": resent(lambda array: array * np.float32(1e30)),
}


def garbage(job):
    """A different kind of garbage in every round, never a valid update."""
    return list(GARBAGE.values())[job.number % len(GARBAGE)](job)


def silent(job):
    return [(1.0, Reply(job.client, job.number, error="no memory"))]


def root(job):
    """The server's own update, for rules that need one."""
    delta = honest(replace(job, client="a"))[0][1].payload
    return Update("server", job.number, job.version, delta, 512)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_garbage_in_every_round_has_the_effect_of_a_failing_client(tmp_path, rule):
    """The weights are those of a run in which the client only fails; each kind is rejected once."""
    outcomes = []
    for name, client in (("garbage", garbage), ("silent", silent)):
        o = options(tmp_path / name, rounds=len(GARBAGE))
        o.validate = ValidateOptions(
            strikes=0
        )  # no quarantine, so that it gets a job in every round
        outcomes.append(run(o, {**HONEST, "mallory": client}, rule, root=root))
    bad, without = outcomes
    assert np.array_equal(bad.params, without.params) and bad.version == len(GARBAGE)
    assert bad.server.totals.rejected == dict.fromkeys(GARBAGE, 1)
    assert {e["client"] for e in bad.events_of("accept")} == set(HONEST)
    assert {e["client"] for e in bad.events_of("reject")} == {"mallory"}


def test_the_servers_own_update_and_an_evaluation_are_never_computed_at_once(tmp_path):
    """They share a device, and while a step is recorded on a GPU no other thread may use it."""
    scoring, met = threading.Event(), []

    class Slow(dict):
        def __missing__(self, version):
            scoring.set()
            time.sleep(0.1)
            scoring.clear()
            return 1.0

    def watching(job):
        met.append(scoring.is_set())
        return root(job)

    outcome = run(options(tmp_path, rounds=4), HONEST, FLTrust(), loss=Slow(), root=watching)
    records = outcome.server.parts.folder.metrics.read()
    assert met == [False] * 4 and [record.get("loss") for record in records] == [1.0] * 5


def test_a_client_is_quarantined_after_garbage_three_times_in_a_row(tmp_path):
    outcome = run(options(tmp_path, rounds=8), {**HONEST, "mallory": garbage})
    (event,) = outcome.events_of("quarantine")
    assert event["client"] == "mallory" and event["until"] == 3 + 10


def test_a_client_that_was_offline_gets_no_strike(tmp_path):
    def offline(job):
        return [(1.0, Reply(job.client, job.number, error="offline for 180 s", code="offline"))]

    o = options(tmp_path, rounds=4)
    o.validate = ValidateOptions(strikes=1)
    outcome = run(o, {**HONEST, "mallory": offline})
    assert outcome.events_of("quarantine") == []
    assert outcome.server.totals.rejected == {"offline": 4}


@pytest.mark.parametrize("code", ["policy", "offline"])
@pytest.mark.parametrize("pace", [{}, {"name": "buffer", "clients": 2, "goal": 2}])
def test_refusals_and_absences_are_no_strike_and_never_end_a_run(tmp_path, pace, code):
    """Also if every site refuses for a long time, as outside its hours, or all are offline, as
    while the server has no network.
    """

    def outside(job):
        why = Reply(job.client, job.number, error="not now", code=code)
        return [(60.0, why)] if job.number < 40 else honest(job)

    o = options(tmp_path, rounds=3, **pace)
    o.validate = ValidateOptions(strikes=1)
    behaviours: dict[str, Behaviour] = dict.fromkeys(HONEST, outside)
    outcome = run(o, behaviours)
    assert outcome.version == 3 and outcome.events_of("quarantine") == []
    assert outcome.server.totals.rejected[code] > 30 * len(HONEST)
    assert set(outcome.server.totals.rejected) == {code}
    # a cohort of these makes no version without an update
    assert outcome.accepted_until(1) >= 2


def test_a_cohort_goes_on_without_a_site_that_refuses(tmp_path):
    def never(job):
        return [(1.0, Reply(job.client, job.number, error="runs=[other]", code="policy"))]

    o = options(tmp_path, rounds=4)
    outcome = run(o, {**HONEST, "mallory": never})
    assert outcome.version == 4
    assert outcome.server.totals.rejected == {"policy": 4}
    assert len(outcome.accepted) == 4 * len(HONEST)


@pytest.mark.parametrize("online", [True, False])
def test_a_deadline_is_no_strike_against_a_client_that_is_offline(tmp_path, monkeypatch, online):
    def available(transport, client):
        return online or client != "mallory" or not transport.jobs

    monkeypatch.setattr(ScriptTransport, "available", available)
    o = options(tmp_path, rounds=4, deadline=5.0)
    o.validate = ValidateOptions(strikes=1)
    outcome = run(o, {**HONEST, "mallory": lambda job: []})
    assert [event["client"] for event in outcome.events_of("quarantine")] == ["mallory"] * online
    assert sum(job.client == "mallory" for job in outcome.jobs) == 1
    assert outcome.server.totals.rejected == {"no_reply": 1}


def test_quarantine_ends_and_survives_a_restart(tmp_path):
    """Three misses, two rounds of quarantine, then back; a restart does not change its length."""

    def failing(job):
        return silent(job) if job.number < 3 else honest(job)

    def two_rounds(folder):
        o = options(folder, rounds=8)
        o.validate = ValidateOptions(rest=2)
        return o

    uninterrupted = run(two_rounds(tmp_path / "uninterrupted"), {**HONEST, "z": failing})
    assert [e["version"] for e in uninterrupted.events_of("quarantine_end")] == [5]
    asked = [job.version for job in uninterrupted.jobs if job.client == "z"]
    assert asked == [0, 1, 2, 5, 6, 7]
    assert [m["quarantined"] for m in uninterrupted.metrics[1:]] == [0, 0, 1, 1, 1, 0, 0, 0]

    first = two_rounds(tmp_path / "parts")
    first.rounds = 4
    run(first, {**HONEST, "z": failing})
    second = run(two_rounds(tmp_path / "parts"), {**HONEST, "z": failing})
    assert np.array_equal(second.params, uninterrupted.params)


def test_a_client_that_hangs_is_quarantined_after_three_deadlines(tmp_path):
    o = options(tmp_path, rounds=8, deadline=5.0)
    outcome = run(o, {**HONEST, "sleepy": lambda job: []})
    assert len([job for job in outcome.jobs if job.client == "sleepy"]) == 3
    assert outcome.server.totals.rejected == {"no_reply": 3}
    assert outcome.metrics[-1]["virtual_seconds"] == 3 * 5.0 + 5 * 1.0, (
        "no later version waits for it"
    )


def test_being_slower_than_the_goal_is_no_failure(tmp_path):
    o = options(tmp_path, rounds=8, goal=5)
    outcome = run(o, {**HONEST, "slow": lambda job: honest(job, 3.0)})
    assert (
        outcome.events_of("quarantine") == []
        and len([j for j in outcome.jobs if j.client == "slow"]) == 8
    )


def test_an_update_far_longer_than_usual_is_rejected_and_a_long_one_is_scaled(tmp_path):
    def big(factor):
        def client(job):
            ((seconds, reply),) = honest(job)
            return [
                (
                    seconds,
                    reply_with(job, reply.payload * np.float32(factor if job.number == 3 else 1)),
                )
            ]

        return client

    o = options(tmp_path / "limit", rounds=5)
    limited = run(o, {**HONEST, "z": big(30)})
    assert [m["rejected"] for m in limited.metrics[1:]] == [{}, {}, {}, {"norm_limit": 1}, {}]

    o = options(tmp_path / "clip", rounds=5)
    o.validate = ValidateOptions(clip=2.0)
    clipped = run(o, {**HONEST, "z": big(6)})
    assert [m["clipped"] for m in clipped.metrics[1:]] == [0, 0, 0, 1, 0]
    assert [m["rejected"] for m in clipped.metrics[1:]] == [{}] * 5
    plain = run(options(tmp_path / "plain", rounds=5), {**HONEST, "z": big(6)})
    steps = [m["step_norm"] for m in clipped.metrics]
    assert steps[4] < plain.metrics[4]["step_norm"] and np.isclose(
        steps[3], plain.metrics[3]["step_norm"]
    )


def test_validate_off_leaves_only_the_limit_from_the_norm_of_the_model(tmp_path):
    """A client that exceeds it every time but one is never quarantined."""

    def z(job):
        ((seconds, reply),) = honest(job)
        factor = np.float32(30 if job.number == 4 else 1e6)
        return [(seconds, reply_with(job, reply.payload * factor))]

    o = replace(options(tmp_path, rounds=6), validate=compose.load(["validate=off"]).validate)
    outcome = run(o, {**HONEST, "z": z})
    once = {"norm_limit": 1}
    assert [m["rejected"] for m in outcome.metrics[1:]] == [once, once, once, once, {}, once]
    assert len([job for job in outcome.jobs if job.client == "z"]) == 6


def test_a_clipped_update_is_as_long_as_the_clip(tmp_path):
    o = options(tmp_path, rounds=10, clients=1)
    o.validate = ValidateOptions(clip=2.0, norm=0.0)

    def client(job):
        delta = np.zeros(SIZE, np.float32)
        delta[0] = 1.0 if job.number < 9 else 7.0
        return [(1.0, reply_with(job, delta))]

    norms = [line.get("step_norm") for line in run(o, {"a": client}).metrics]
    assert norms[9] == pytest.approx(1) and norms[10] == pytest.approx(2.0)


def collect(collector: UpdateCollector, client: str, delta: np.ndarray) -> None:
    """Read and add the update of a client's first job."""
    codec, update = codec_of(RunOptions().update), Update(client, 0, 0, delta, 10, {})
    payload = compress(delta, codec)
    header = header_of("run", update, payload, codec)
    job = Job(client, 0, 0, np.zeros_like(delta), Plan("run", 1, 0, 1, 1))
    collector.add(collector.read(Reply(client, 0, header, payload), job, 10), job, 0)


def test_an_element_that_does_not_fit_the_exact_sum_is_a_rejection():
    collectors = Collectors(RunOptions(), FedAvg(), Privacy(), 2, "run")
    collector = collectors.open(ServerState(np.zeros(2, np.float32)), (), 8, Clients())
    limit = collector.limits.norm
    delta = np.array([1.01 * limit, 0], np.float32)
    update = Update("a", 0, 0, delta, 10, {"update_norm": limit})  # as if it were rounded down
    with pytest.raises(UpdateRejected, match="norm_limit: an element"):
        collector.add(update, Job("a", 0, 0, delta, Plan("run", 1, 0, 1, 1)), 0)
    assert len(collector) == 0


def test_the_vector_of_an_accepted_update_is_not_kept():
    collectors = Collectors(RunOptions(), FedAvg(), Privacy(), 2, "run")
    collector = collectors.open(ServerState(np.zeros(2, np.float32)), (), 8, Clients())
    for client in "ab":
        collect(collector, client, np.ones(2, np.float32))
    assert [update.delta.size for update in collector.accepted] == [0, 0]


def test_the_norm_limit_follows_the_updates_of_earlier_versions_only():
    """The updates of a version do not move its own limit, whichever of them comes first."""
    size, options = 4, RunOptions()
    collectors = Collectors(options, FedAvg(), Privacy(), size, "run")
    earlier = (0.3,) * ENOUGH  # so that the limit of the version is 10 * 0.3
    state = ServerState(np.zeros(size, np.float32))
    collector = collectors.open(state, earlier, 40, Clients())

    def answered(client: int, norm: float) -> None:
        # no element exceeds the limit by itself: the exact sum would refuse such an update, too
        collect(collector, f"c{client}", np.full(size, norm / 2, np.float32))

    for client in range(3 * ENOUGH):  # which have most of the norms now
        answered(client, 2.9)
    with pytest.raises(UpdateRejected, match="norm_limit"):
        answered(99, 3.1)
    later = collectors.open(state, collector.norms_after(earlier), 40, Clients())
    assert later.limits.norm == pytest.approx(10.0), "the second limit"
    collector = later
    answered(99, 3.1)
