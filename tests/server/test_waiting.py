"""Every wait ends, and no update is lost: deadlines, grace, windows, failures, interrupts."""

from __future__ import annotations

import json
from unittest.mock import ANY

import numpy as np
import pytest
from support.fake_transport import honest, reply_with
from support.harness import run_virtual

from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import FedGPTError, Interrupted, StoppedEarly
from fedgpt.core.messages import Reply
from fedgpt.core.options import FleetOptions
from fedgpt.storage.checkpoint import Checkpoints

FOUR = dict.fromkeys("abcd", honest)


@pytest.mark.parametrize("deadline", [10.1, 12.3, 25.7])
@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_a_deadline_ends_despite_rounding(tmp_path, deadline, jitter):
    """30.3 - 20.2 is below 10.1, and 30.3 plus what is missing is 30.3."""
    fleet = FleetOptions("published", jitter=jitter)
    run = run_virtual(
        tmp_path, FOUR, FedAvg(), name="cohort", rounds=12, fleet=fleet, deadline=deadline
    )
    assert run.summary["versions"] == 12


def test_a_grace_ends_despite_rounding(tmp_path):
    run = run_virtual(
        tmp_path,
        FOUR,
        FedBuff(),
        rounds=60,
        goal=2,
        grace=0.3,
        fleet=FleetOptions("published", jitter=0.2),
    )
    assert run.summary["versions"] == 60


def test_a_long_grace_is_limited_by_the_capacity_of_a_step(tmp_path):
    """A client with a new job may reply again; a step never takes more updates than planned."""
    run = run_virtual(tmp_path, FOUR, FedBuff(), rounds=10, goal=2, grace=300.0)
    assert all(2 <= record["accepted"] <= 10 for record in run.metrics[1:])


def test_a_deadline_begins_when_the_first_job_is_sent(tmp_path):
    fleet = FleetOptions("constant", step_seconds=[1.0], window=[30.0, 200.0])
    two = dict.fromkeys("ab", honest)
    run = run_virtual(
        tmp_path, two, FedAvg(), name="cohort", rounds=3, fleet=fleet, deadline=20.0, minimum=0
    )
    assert run.summary["versions"] == 3


@pytest.mark.parametrize("pace", [{"name": "buffer"}, {"name": "cohort", "minimum": 0}])
def test_replies_that_never_come_stop_the_run(tmp_path, pace):
    with pytest.raises(StoppedEarly, match="40 jobs in a row failed: no_reply"):
        run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=100, deadline=1.0, **pace)


def test_failures_after_a_good_update_stop_the_run(tmp_path):
    def once(job):
        good = job.client == "a" and job.number == 0
        return (
            honest(job) if good else [(0.0, Reply(job.client, job.number, error="code 2: no text"))]
        )

    with pytest.raises(StoppedEarly, match="40 jobs in a row failed"):
        run_virtual(tmp_path, dict.fromkeys("abcd", once), FedBuff(), rounds=10, goal=2)


@pytest.mark.parametrize("every", [0, 1, 4])
@pytest.mark.parametrize("crash_at", [0, 2, 9])
def test_a_run_interrupted_anywhere_equals_the_uninterrupted_run(tmp_path, every, crash_at):
    """Also in the first version, and between two checkpoints; no line of metrics is missing."""
    uninterrupted = run_virtual(
        tmp_path / "uninterrupted", FOUR, FedBuff(), rounds=12, goal=2, checkpoint=every
    )
    calls = []

    def dies(job):
        calls.append(job)
        if job.version == crash_at and len(calls) > 3:
            raise KeyboardInterrupt
        return honest(job)

    with pytest.raises(Interrupted):
        run_virtual(
            tmp_path / "interrupted",
            dict.fromkeys("abcd", dies),
            FedBuff(),
            rounds=12,
            goal=2,
            checkpoint=every,
        )
    again = run_virtual(
        tmp_path / "interrupted", FOUR, FedBuff(), rounds=12, goal=2, checkpoint=every
    )
    assert again.summary["weights_sha256"] == uninterrupted.summary["weights_sha256"]
    assert [record["version"] for record in again.metrics] == list(range(13))


def test_jobs_keep_the_client_state_that_a_restart_could_need(tmp_path):
    run = run_virtual(tmp_path, FOUR, FedBuff(), rounds=30, goal=4, checkpoint=4)
    for job in run.jobs:
        assert job.plan.state_job == -1 or job.plan.state_job in job.plan.keep


def test_a_run_with_only_damaged_checkpoints_is_not_started_over(tmp_path):
    run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=4)
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"torn")
    with pytest.raises(FedGPTError, match=r"no checkpoint in .* can be used"):
        run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=4)


def test_a_damaged_newest_checkpoint_is_renamed_and_made_again(tmp_path):
    first = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=9)
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(b"torn")
    assert run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=9).summary == {
        **first.summary,
        "wall_seconds": ANY,
    }
    assert newest.with_suffix(".damaged").exists()
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    assert checkpoints.load().state.version == 9
    checkpoints.close()


def test_the_virtual_clock_discards_replies_that_never_arrive(tmp_path):
    fleet = FleetOptions("constant", step_seconds=[1.0], up=20_000.0, window=[40.0, 5.0])
    run = run_virtual(tmp_path, FOUR, DeltaSGD(), rounds=40, fleet=fleet)
    assert run.summary["rejected"]["client_error"] > 5
    assert len(run.server.parts.transport._computed) <= 4


def test_metrics_that_cannot_be_added_up_are_refused(tmp_path):
    def liar(job):
        [(seconds, reply)] = honest(job)
        header = json.loads(reply.header)
        header["metrics"]["train_loss"] = 1.7e308
        return [
            (
                seconds,
                Reply(job.client, job.number, json.dumps(header), reply.payload, bytes=reply.bytes),
            )
        ]

    run = run_virtual(tmp_path, {**FOUR, "a": liar, "b": liar}, FedAvg(), name="cohort", rounds=2)
    assert run.summary["rejected"] == {"bad_metric": 4}


def test_an_element_just_above_the_norm_limit_is_rejected(tmp_path):
    def spike(job):
        delta = np.zeros(job.params.size, np.float32)
        limit = 10.0 * max(1.0, float(np.linalg.norm(job.params)))
        delta[0] = np.nextafter(np.float32(limit), np.float32(np.inf))
        return [(0.0, reply_with(job, delta))]

    run = run_virtual(tmp_path, {**FOUR, "a": spike}, FedAvg(), name="cohort", rounds=3)
    assert run.summary["rejected"] == {"norm_limit": 3}
