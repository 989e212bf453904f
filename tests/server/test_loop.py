"""The loop with scripted clients: its waits, its counts, and replies that must have no effect."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from support.advice import advises
from support.fake_transport import honest, reply_with
from support.harness import SIZE, Outcome, options, run

from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.geometric_median import GeometricMedian
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.core.errors import Interrupted, StoppedEarly
from fedgpt.core.messages import Reply
from fedgpt.core.options import CheckpointOptions, ValidateOptions


def serve(folder, behaviours, strategy=None, **pace) -> Outcome:
    """A complete run of the server, without quarantine, which has its own tests."""
    o = replace(options(folder, **pace), validate=ValidateOptions(strikes=0))
    return run(o, behaviours, strategy)


CLIENTS = dict.fromkeys("abcde", honest)


def test_weights_are_the_weighted_mean_of_what_clients_sent(tmp_path):
    def fixed(job, value, tokens):
        return [(1.0, reply_with(job, np.full(SIZE, value, np.float32), tokens))]

    start = np.linspace(-1, 1, SIZE, dtype=np.float32)
    clients = {
        "a": partial(fixed, value=1.0, tokens=128),
        "b": partial(fixed, value=0.2, tokens=384),
    }
    done = serve(tmp_path, clients, rounds=1)
    np.testing.assert_allclose(
        done.server.state.params, start - (0.25 * 1.0 + 0.75 * 0.2), rtol=0, atol=1e-6
    )
    assert done.summary["tokens"] == 512 and done.summary["versions"] == 1
    assert [m["version"] for m in done.metrics] == [0, 1]
    assert done.metrics[1]["accepted"] == 2 and done.metrics[1]["staleness"] == {"0": 2}


class Added(FedAvg):
    """A rule that adds in float32, in the order in which it gets the updates of a cohort."""

    def combine(self, updates, state, root=None):
        return sum((update.delta for update in updates), np.zeros_like(state.params))


@pytest.mark.parametrize("rule", [FedAdam(), Added()], ids=["linear", "not linear"])
def test_the_order_of_arrival_changes_no_bit(tmp_path, rule):
    digests = set()
    for number, delays in enumerate([(1, 2, 3, 4, 5), (5, 4, 3, 2, 1), (3, 1, 5, 2, 4)]):
        clients = {n: partial(honest, seconds=s) for n, s in zip("abcde", delays, strict=True)}
        digests.add(serve(tmp_path / str(number), clients, rule).summary["weights_sha256"])
    assert len(digests) == 1


def test_a_sampled_cohort_is_sorted_distinct_and_differs_between_versions(tmp_path):
    done = serve(tmp_path, CLIENTS, rounds=6, clients=2)
    cohorts = [[j.client for j in done.jobs if j.version == v] for v in range(6)]
    assert all(len(set(c)) == 2 and c == sorted(c) for c in cohorts)
    assert len({tuple(c) for c in cohorts}) > 1


def test_jobs_are_numbered_per_client_and_the_schedule_counts_all_tokens(tmp_path):
    done = serve(tmp_path, dict.fromkeys("ab", honest), rounds=3)
    assert [(j.client, j.number, j.version) for j in done.jobs] == [
        ("a", 0, 0),
        ("b", 0, 0),
        ("a", 1, 1),
        ("b", 1, 1),
        ("a", 2, 2),
        ("b", 2, 2),
    ]
    last = done.jobs[-1].plan
    assert last.tokens_done == 2 * 2 * 512 and last.tokens_total == 3 * 2 * 512
    assert last.tokens_per_step == 2 * 128 and last.state_job == 1


@pytest.mark.parametrize(
    "spoil, code",
    [
        (lambda d: d * np.float32(np.nan), "non_finite"),
        (lambda d: np.where(np.arange(SIZE) == 7, np.float32(np.inf), d), "non_finite"),
        (lambda d: d * np.float32(1e6), "norm_limit"),
        (lambda d: np.full(SIZE, 3e38, np.float32), "norm_limit"),
        (lambda d: d[:-1], "size_mismatch"),
        (lambda d: d.reshape(1, -1), "wrong_shape"),
        (lambda d: d.astype(np.float64), "wrong_dtype"),
        (lambda d: d.astype(">f4"), "wrong_dtype"),
    ],
)
def test_a_bad_update_is_counted_and_changes_nothing_else(tmp_path, spoil, code):
    def bad(job):
        [(seconds, reply)] = honest(job)
        return [(seconds, reply_with(job, spoil(reply.payload)))]

    def absent(job):
        return [(1.0, Reply(job.client, job.number, error="code 2: away"))]

    with_bad = serve(tmp_path / "bad", {**CLIENTS, "c": bad})
    without = serve(tmp_path / "absent", {**CLIENTS, "c": absent})
    assert with_bad.summary["rejected"] == {code: 4}
    assert without.summary["rejected"] == {"client_error": 4}
    assert with_bad.summary["weights_sha256"] == without.summary["weights_sha256"]


def test_a_reply_counts_once(tmp_path):
    def twice(job):
        [(seconds, reply)] = honest(job)
        return [(seconds / 2, reply), (seconds / 2, reply)]

    doubled = serve(tmp_path / "twice", {**CLIENTS, "a": twice}).summary
    once = serve(tmp_path / "once", CLIENTS).summary
    assert doubled["weights_sha256"] == once["weights_sha256"]
    assert doubled["rejected"] == {"duplicate": 4}


def test_a_client_that_sends_each_reply_twice_has_not_failed(tmp_path):
    def twice(job):
        return honest(job) * 4

    done = run(options(tmp_path, rounds=6), {**CLIENTS, "a": twice})
    assert done.summary["rejected"] == {"duplicate": 6 * 3} and not done.events_of("quarantine")


def test_accepted_updates_of_clients_that_lost_their_state_are_counted(tmp_path):
    def client(job, spoil=1.0):
        [(seconds, reply)] = honest(job)
        sent = reply.payload * np.float32(spoil)
        return [(seconds, reply_with(job, sent, state_lost=float(job.number == 1)))]

    clients = {"a": honest, "b": client, "c": client, "d": partial(client, spoil=np.nan)}
    done = serve(tmp_path, clients, rounds=3)
    assert [m["state_lost"] for m in done.metrics] == [0, 0, 2, 0], "d's update is rejected"


def test_a_version_says_in_how_small_micro_batches_its_updates_were_computed(tmp_path):
    def split(job, size):
        [(seconds, reply)] = honest(job)
        more = {"micro_batch": size} if job.number == 1 else {}
        return [(seconds, reply_with(job, reply.payload, **more))]

    clients = {"a": honest, "b": partial(split, size=4.0), "c": partial(split, size=2.0)}
    done = serve(tmp_path, {**clients, "d": honest}, rounds=3)
    assert [m["micro_batch"] for m in done.metrics] == [None, None, 2, None]


def test_replies_to_jobs_that_were_never_sent_are_refused(tmp_path):
    def liar(job):
        [(seconds, reply)] = honest(job)
        return [(0.1, replace(reply, number=99)), (seconds, reply)]

    assert serve(tmp_path / "a", {**CLIENTS, "a": liar}).summary["rejected"] == {"unknown_job": 4}


def test_a_deadline_closes_the_version_with_the_updates_received(tmp_path):
    slow = {**CLIENTS, "e": partial(honest, seconds=50.0), "d": lambda job: []}
    done = serve(tmp_path, slow, deadline=3.0)
    assert done.transport.time == 4 * 3.0
    assert [m["accepted"] for m in done.metrics[1:]] == [3, 3, 3, 3]
    assert done.summary["rejected"] == {"no_reply": 8}


def test_late_replies_are_rejected_as_late(tmp_path):
    slow = {**CLIENTS, "e": partial(honest, seconds=4.0)}
    done = serve(tmp_path, slow, deadline=3.0)
    assert done.summary["rejected"] == {"no_reply": 4, "late": 3}


def test_a_goal_closes_the_version_early(tmp_path):
    clients = {
        n: partial(honest, seconds=s) for n, s in zip("abcde", (1, 2, 3, 40, 50), strict=True)
    }
    done = serve(tmp_path, clients, goal=3)
    assert [m["accepted"] for m in done.metrics[1:]] == [3, 3, 3, 3]
    assert done.transport.time == 12.0


def test_over_selection_ignores_late_clients_and_counts_them(tmp_path):
    """Of ten clients eight are enough: two jobs are given up, and their replies are late."""
    names = "abcdefghij"
    clients = {name: partial(honest, seconds=1.0 if name < "i" else 1.4) for name in names}
    done = serve(tmp_path / "all", clients, goal=8, rounds=3)
    assert len(done.jobs) == 30 and [m["accepted"] for m in done.metrics[1:]] == [8, 8, 8]
    assert [m["rejected"] for m in done.metrics[1:]] == [
        {"no_reply": 2},
        *[{"late": 2, "no_reply": 2}] * 2,
    ]
    assert done.summary["rejected"] == {"no_reply": 6, "late": 4}
    without = serve(
        tmp_path / "eight", {**clients, "i": lambda job: [], "j": lambda job: []}, goal=8, rounds=3
    )
    assert without.summary["weights_sha256"] == done.summary["weights_sha256"]


def test_too_few_updates_stop_the_run_with_the_reasons(tmp_path):
    def broken(job):
        return [(1.0, Reply(job.client, job.number, error="code 2: no text"))]

    with pytest.raises(
        StoppedEarly, match=r"1 valid updates of 2 jobs, pace.minimum=2: client_error x1"
    ):
        serve(tmp_path, {"a": honest, "b": broken}, minimum=2)


def test_a_version_without_participants_does_not_change_the_weights(tmp_path):
    done = serve(tmp_path, dict.fromkeys("ab", honest), rounds=6, rate=0.3)
    empty = [m for m in done.metrics[1:] if m["accepted"] == 0]
    assert empty and all(m["step_norm"] == 0 for m in empty)
    assert done.summary["versions"] == 6


NEED = [Median(), GeometricMedian(), TrimmedMean(trim=2), Krum(), Krum(attackers=2)]
TEN = dict.fromkeys("abcdefghij", honest)


@pytest.mark.parametrize("rule", NEED, ids=lambda rule: f"{rule.name} {rule.needed}")
def test_a_version_for_which_coins_choose_too_few_leaves_the_model_as_it_is(tmp_path, rule, caplog):
    """Their number is random, so a run with robust rules would end sooner or later."""
    about = {"rounds": 20, "rate": rule.needed / 10}
    found = {}
    for name, chosen in (("robust", rule), ("mean", FedAvg())):
        done = serve(tmp_path / name, TEN, chosen, **about)
        found[name] = [(m["accepted"], m["step_norm"] > 0) for m in done.metrics[1:]]
        assert done.version == 20
    assert found["mean"] == [(n, n > 0) for n, _ in found["mean"]]
    assert found["robust"] == [(n, n >= rule.needed) for n, _ in found["mean"]]
    few = [n for n, _ in found["robust"] if 0 < n < rule.needed]
    assert few and len(few) < 20
    told = [r.message for r in caplog.records if "leaves the model as it is" in r.message]
    assert (
        len(told) == len(few) and f"coins chose {few[0]} clients, strategy={rule.name}" in told[0]
    )


@pytest.mark.parametrize("pace", [{"rate": 1.0}, {"clients": 10}, {"clients": 10, "goal": 8}])
def test_too_few_updates_because_clients_failed_stop_the_run_with_any_pace(tmp_path, pace):
    def broken(job):
        return [(1.0, Reply(job.client, job.number, error="code 2: no text"))]

    clients = {**TEN, **dict.fromkeys("abcdef", broken)}
    with pytest.raises(StoppedEarly, match=r"strategy=krum needs at least 5 updates.* 4 arrived"):
        serve(tmp_path, clients, Krum(), **pace)


def test_a_failed_job_of_a_cohort_that_is_too_small_anyway_does_not_stop_the_run(tmp_path):
    about = {"rounds": 20, "rate": 0.5, "minimum": 0}
    without = serve(tmp_path / "without", TEN, Krum(), **about)
    few = next(m["version"] for m in without.metrics[1:] if 1 < m["accepted"] < 5)
    first = min(job.client for job in without.jobs if job.version + 1 == few)

    def broken_once(job):
        error = [(1.0, Reply(job.client, job.number, error="code 2: no text"))]
        return error if (job.client, job.version + 1) == (first, few) else honest(job)

    done = serve(tmp_path, dict.fromkeys(TEN, broken_once), Krum(), **about)
    assert 0 < done.metrics[few]["accepted"] == without.metrics[few]["accepted"] - 1
    assert done.metrics[few]["step_norm"] == 0 and done.version == 20


def test_coins_alone_do_not_stop_a_run_by_pace_minimum(tmp_path):
    done = serve(tmp_path, TEN, rounds=10, rate=0.3, minimum=5)
    assert min(m["accepted"] for m in done.metrics[1:]) < 5 and done.version == 10


def test_diverged_weights_stop_the_run(tmp_path):
    class Exploding(FedAvg):
        def step(self, d, state):
            return replace(super().step(d, state), params=state.params * np.float32(np.inf))

    with pytest.raises(StoppedEarly, match="NaN or Inf"), np.errstate(invalid="ignore"):
        serve(tmp_path, CLIENTS, Exploding())


def test_weights_that_grow_too_large_stop_the_run_with_advice(tmp_path):
    """They are finite, but their squares overflow float32, so the exact sum would have no scale."""

    class RunningAway(FedAvg):
        def step(self, d, state):
            return replace(super().step(d, state), params=state.params * np.float32(1e25))

    words = r"version 1 has weights of length 1\S*e\+26: "
    with pytest.raises(StoppedEarly, match=words) as stopped:
        serve(tmp_path / "a", CLIENTS, RunningAway())
    advises(stopped.value, "lower local.lr, or strategy.eta if the strategy has it")
    assert serve(tmp_path / "b", CLIENTS, FedAvg(eta=0.5)).version == 4


def _untimed(rows):
    return [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows]


@pytest.mark.parametrize("crash_at", range(1, 4))
def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(tmp_path, crash_at):
    """A server that stops within a version, after some replies, starts that version again."""
    uninterrupted = serve(tmp_path / "uninterrupted", CLIENTS, FedAdam())

    def dies(job):
        if job.version == crash_at:
            raise KeyboardInterrupt
        return honest(job)

    with pytest.raises(Interrupted, match="resume="):
        serve(tmp_path / "interrupted", {**CLIENTS, "e": dies}, FedAdam())
    resumed = serve(tmp_path / "interrupted", CLIENTS, FedAdam())
    assert resumed.summary["weights_sha256"] == uninterrupted.summary["weights_sha256"]
    assert _untimed([resumed.summary]) == _untimed([uninterrupted.summary])
    assert _untimed(resumed.metrics) == _untimed(uninterrupted.metrics)
    first = next(j for j in resumed.jobs if j.client == "a")
    again = next(j for j in uninterrupted.jobs if j.client == "a" and j.version == crash_at)
    assert first.number == again.number and first.plan == again.plan


def test_a_run_that_was_stopped_several_times_in_one_version_has_not_crashed(tmp_path):
    """After three crashes the checkpoint before would be used."""

    def stops(job):
        if job.version == 2:
            raise KeyboardInterrupt
        return honest(job)

    for _ in range(4):
        with pytest.raises(Interrupted):
            serve(tmp_path, {**CLIENTS, "e": stops}, FedAdam())
    resumed = serve(tmp_path, CLIENTS, FedAdam())
    assert min(job.version for job in resumed.jobs) == 2
    assert not list((tmp_path / "checkpoints").glob("*.damaged"))


def test_jobs_name_every_client_state_that_a_restart_could_need(tmp_path):
    done = serve(tmp_path, {"a": honest}, rounds=6)
    keep = [j.plan.keep for j in done.jobs]
    assert keep == [(), (0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]


def test_jobs_keep_the_states_of_the_checkpoint_that_an_interrupted_server_wrote(tmp_path):
    """It is not among the regular ones, of every fourth version."""
    for rounds in (2, 4):
        o = options(tmp_path, rounds=rounds)
        o.checkpoint = CheckpointOptions(every=4)
        done = run(o, {"a": honest})
    assert [(j.number, 1 in j.plan.keep) for j in done.jobs] == [(2, True), (3, True)]
