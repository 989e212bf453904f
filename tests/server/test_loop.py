"""The loop against scripted clients: who is waited for, what is counted, and what changes
nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from support.fake_transport import ScriptTransport, honest, reply_with

from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.core.errors import Interrupted, StoppedEarly
from fedgpt.core.messages import Reply, ServerState
from fedgpt.core.options import LocalOptions, ModelOptions, PaceOptions, RunOptions, ValidateOptions
from fedgpt.server.loop import Server
from fedgpt.storage.checkpoint import Checkpoints, RunTables, Snapshot
from fedgpt.storage.run_folder import RunFolder

SIZE = 300


def options(tmp_path, rounds=4, **pace) -> RunOptions:
    return RunOptions(
        seed=3,
        rounds=rounds,
        run_dir=str(tmp_path),
        model=ModelOptions(block_size=64),
        local=LocalOptions(steps=4, batch_size=2),  # a job is 512 tokens
        pace=PaceOptions(**{"clients": 0, **pace}),
        validate=ValidateOptions(strikes=0),  # quarantine has tests of its own
    )


def serve(tmp_path, behaviours, strategy=None, seen=None, **pace):
    """Run the real server to its end over a script; returns it."""
    o = options(tmp_path, **pace)
    folder = RunFolder(tmp_path)
    snapshot = Checkpoints(folder.checkpoints, 2).recover()
    if snapshot is None:
        params = np.linspace(-1, 1, SIZE, dtype=np.float32)
        snapshot = Snapshot(
            ServerState(params), RunTables("run", record={"version": 0, "tokens": 0})
        )
    else:
        version = snapshot.state.version
        folder.metrics.keep(r for r in folder.metrics.read() if r["version"] < version)

    def evaluate(version, params, sample):
        loss = float(np.abs(params).mean())
        return {"loss": loss, "perplexity": 1.0, "bits_per_byte": loss}

    transport = ScriptTransport(behaviours, snapshot.tables.seconds)
    events = [] if seen is None else seen
    observer = lambda event, about: events.append((event, about))  # noqa: E731
    server = Server(o, strategy or FedAvg(), transport, evaluate, folder, snapshot, [observer])
    try:
        summary = server.run()
    finally:
        folder.close()
    return server, transport, summary, folder.metrics.read()


CLIENTS = dict.fromkeys("abcde", honest)


def test_weights_are_the_weighted_mean_of_what_clients_sent(tmp_path):
    def fixed(job, value, tokens):
        return [(1.0, reply_with(job, np.full(SIZE, value, np.float32), tokens))]

    start = np.linspace(-1, 1, SIZE, dtype=np.float32)
    clients = {
        "a": partial(fixed, value=1.0, tokens=128),
        "b": partial(fixed, value=0.2, tokens=384),
    }
    server, _, summary, metrics = serve(tmp_path, clients, rounds=1)
    np.testing.assert_allclose(
        server.state.params, start - (0.25 * 1.0 + 0.75 * 0.2), rtol=0, atol=1e-6
    )
    assert summary["tokens"] == 512 and summary["versions"] == 1
    assert [m["version"] for m in metrics] == [0, 1]
    assert metrics[1]["accepted"] == 2 and metrics[1]["staleness"] == {"0": 2}


def test_order_of_arrival_never_changes_a_bit(tmp_path):
    digests = set()
    for number, delays in enumerate([(1, 2, 3, 4, 5), (5, 4, 3, 2, 1), (3, 1, 5, 2, 4)]):
        clients = {n: partial(honest, seconds=s) for n, s in zip("abcde", delays, strict=True)}
        digests.add(serve(tmp_path / str(number), clients, FedAdam())[2]["weights_sha256"])
    assert len(digests) == 1


def test_a_sampled_cohort_is_sorted_distinct_and_differs_between_versions(tmp_path):
    _, transport, _, _ = serve(tmp_path, CLIENTS, rounds=6, clients=2)
    cohorts = [[j.client for j in transport.jobs if j.version == v] for v in range(6)]
    assert all(len(set(c)) == 2 and c == sorted(c) for c in cohorts)
    assert len({tuple(c) for c in cohorts}) > 1


def test_tasks_count_per_client_and_the_schedule_counts_all_tokens(tmp_path):
    _, transport, _, _ = serve(tmp_path, dict.fromkeys("ab", honest), rounds=3)
    assert [(j.client, j.number, j.version) for j in transport.jobs] == [
        ("a", 0, 0), ("b", 0, 0), ("a", 1, 1), ("b", 1, 1), ("a", 2, 2), ("b", 2, 2),
    ]  # fmt: skip
    last = transport.jobs[-1].plan
    assert last.tokens_done == 2 * 2 * 512 and last.tokens_total == 3 * 2 * 512
    assert last.tokens_per_step == 2 * 128 and last.state == 1


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
    assert with_bad[2]["rejected"] == {code: 4}
    assert without[2]["rejected"] == {"client_error": 4}
    assert with_bad[2]["weights_sha256"] == without[2]["weights_sha256"]


def test_a_reply_counts_once(tmp_path):
    def twice(job):
        [(seconds, reply)] = honest(job)
        return [(seconds / 2, reply), (seconds / 2, reply)]

    doubled = serve(tmp_path / "twice", {**CLIENTS, "a": twice})[2]
    once = serve(tmp_path / "once", CLIENTS)[2]
    assert doubled["weights_sha256"] == once["weights_sha256"]
    assert doubled["rejected"] == {"duplicate": 4}


def test_replies_to_tasks_that_were_never_given_are_refused(tmp_path):
    def liar(job):
        [(seconds, reply)] = honest(job)
        return [(0.1, replace(reply, number=99)), (seconds, reply)]

    assert serve(tmp_path / "a", {**CLIENTS, "a": liar})[2]["rejected"] == {"unknown_job": 4}


def test_a_deadline_closes_the_version_with_what_is_there(tmp_path):
    slow = {**CLIENTS, "e": partial(honest, seconds=50.0), "d": lambda job: []}
    _, transport, summary, metrics = serve(tmp_path, slow, deadline=3.0)
    assert transport.time == 4 * 3.0
    assert [m["accepted"] for m in metrics[1:]] == [3, 3, 3, 3]
    assert summary["rejected"] == {"no_reply": 8}


def test_late_replies_are_refused_by_name(tmp_path):
    slow = {**CLIENTS, "e": partial(honest, seconds=4.0)}
    summary = serve(tmp_path, slow, deadline=3.0)[2]
    assert summary["rejected"] == {"no_reply": 4, "late": 3}


def test_a_goal_closes_the_version_early(tmp_path):
    clients = {
        n: partial(honest, seconds=s) for n, s in zip("abcde", (1, 2, 3, 40, 50), strict=True)
    }
    _, transport, _, metrics = serve(tmp_path, clients, goal=3)
    assert [m["accepted"] for m in metrics[1:]] == [3, 3, 3, 3]
    assert transport.time == 12.0


def test_over_selection_ignores_who_is_late_and_counts_them(tmp_path):
    """Ten are asked, eight are enough: the other two are given up when the version closes, and come
    too late.
    """
    names = "abcdefghij"
    clients = {name: partial(honest, seconds=1.0 if name < "i" else 1.4) for name in names}
    _, transport, summary, metrics = serve(tmp_path / "all", clients, goal=8, rounds=3)
    assert len(transport.jobs) == 30 and [m["accepted"] for m in metrics[1:]] == [8, 8, 8]
    assert [m["rejected"] for m in metrics[1:]] == [
        {"no_reply": 2},
        *[{"late": 2, "no_reply": 2}] * 2,
    ]
    assert summary["rejected"] == {"no_reply": 6, "late": 4}
    without = serve(
        tmp_path / "eight", {**clients, "i": lambda job: [], "j": lambda job: []}, goal=8, rounds=3
    )
    assert without[2]["weights_sha256"] == summary["weights_sha256"]


def test_too_few_updates_stop_the_run_with_the_reasons(tmp_path):
    def broken(job):
        return [(1.0, Reply(job.client, job.number, error="code 2: no text"))]

    with pytest.raises(
        StoppedEarly, match=r"1 valid updates of 2 jobs, pace.minimum=2: client_error x1"
    ):
        serve(tmp_path, {"a": honest, "b": broken}, minimum=2)


def test_a_coin_that_picks_nobody_makes_a_version_without_a_change(tmp_path):
    _, _, summary, metrics = serve(tmp_path, dict.fromkeys("ab", honest), rounds=6, rate=0.3)
    empty = [m for m in metrics[1:] if m["accepted"] == 0]
    assert empty and all(m["step_norm"] == 0 for m in empty)
    assert summary["versions"] == 6


def test_diverged_weights_stop_the_run(tmp_path):
    class Exploding(FedAvg):
        def step(self, d, state):
            return replace(super().step(d, state), params=state.params * np.float32(np.inf))

    with pytest.raises(StoppedEarly, match="NaN or Inf"), np.errstate(invalid="ignore"):
        serve(tmp_path, CLIENTS, Exploding())


def test_weights_that_run_away_stop_the_run_with_what_to_change(tmp_path):
    """Finite, though their squares are not in float32: no scale could be found for the next
    updates.
    """

    class RunningAway(FedAvg):
        def step(self, d, state):
            return replace(super().step(d, state), params=state.params * np.float32(1e25))

    with pytest.raises(
        StoppedEarly, match=r"version 1 has weights of length 1\S*e\+26: .*lower strategy.eta"
    ):
        serve(tmp_path, CLIENTS, RunningAway())


@pytest.mark.parametrize("crash_at", range(1, 4))
def test_resume_equals_not_stopping_bit_for_bit(tmp_path, crash_at):
    """A server that dies in the middle of a version, after some of its replies, starts that version
    again.
    """
    whole = serve(tmp_path / "whole", CLIENTS, FedAdam())

    def dies(job):
        if job.version == crash_at:
            raise KeyboardInterrupt
        return honest(job)

    with pytest.raises(Interrupted, match="resume="):
        serve(tmp_path / "cut", {**CLIENTS, "e": dies}, FedAdam())
    resumed = serve(tmp_path / "cut", CLIENTS, FedAdam())
    assert resumed[2]["weights_sha256"] == whole[2]["weights_sha256"]
    assert {k: v for k, v in resumed[2].items() if k != "wall_seconds"} == {
        k: v for k, v in whole[2].items() if k != "wall_seconds"
    }
    drop = lambda rows: [{k: v for k, v in r.items() if k != "wall_seconds"} for r in rows]  # noqa: E731
    assert drop(resumed[3]) == drop(whole[3])
    first = next(j for j in resumed[1].jobs if j.client == "a")
    again = next(j for j in whole[1].jobs if j.client == "a" and j.version == crash_at)
    assert first.number == again.number and first.plan == again.plan


def test_jobs_name_every_client_state_that_a_restart_could_ask_for(tmp_path):
    _, transport, _, _ = serve(tmp_path, {"a": honest}, rounds=6)
    keep = [j.plan.keep for j in transport.jobs]
    assert keep == [(), (0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]
