"""Evaluation runs beside training; the numbers of a version's record, computed by hand."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from support.fake_transport import honest, reply_with
from support.harness import SIZE, options, run, run_virtual

from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.core.options import CheckpointOptions, EvaluateOptions, FleetOptions
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.run_folder import read_lines

ROUNDS = 6
BOUND = 20.0  # seconds for which an evaluation waits for training at most


@pytest.mark.parametrize(
    "evaluate, checkpoint, ahead",
    [
        # every version is scored while clients train on it
        (EvaluateOptions(), CheckpointOptions(), 0),
        # and while they train on the next one
        (EvaluateOptions(every=2, samples=0), CheckpointOptions(every=0), 1),
    ],
)
def test_training_continues_while_a_version_is_scored(tmp_path, evaluate, checkpoint, ahead):
    """evaluate(v) returns only after jobs on version v + `ahead` are sent."""
    sent = [threading.Event() for _ in range(ROUNDS)]
    waited = []

    def client(job):
        sent[job.version].set()
        return honest(job)

    class Losses(dict):
        def __missing__(self, version: int) -> float:
            if version + ahead < ROUNDS:
                waited.append((version, sent[version + ahead].wait(BOUND)))
            return 1.0

    o = replace(options(tmp_path, ROUNDS), evaluate=evaluate, checkpoint=checkpoint)
    outcome = run(o, dict.fromkeys("ab", client), loss=Losses())
    every = evaluate.every or 1
    assert waited == [(version, True) for version in range(0, ROUNDS - ahead, every)]
    assert [m["version"] for m in outcome.metrics] == list(range(ROUNDS + 1)), (
        "in the order of versions"
    )


def test_metrics_have_every_version_before_a_checkpoint_when_it_is_written(tmp_path, monkeypatch):
    """A server that is killed then has lost no line that it would not write again."""

    class Slow(dict):
        def __missing__(self, version: int) -> float:
            time.sleep(0.05)
            return 1.0

    save, lines = Checkpoints.save, []

    def counted(self, snapshot):
        records = read_lines(self.folder.parent / "metrics.jsonl")
        lines.append((snapshot.state.version, len(list(records))))
        save(self, snapshot)

    monkeypatch.setattr(Checkpoints, "save", counted)
    o = replace(options(tmp_path, 4), checkpoint=CheckpointOptions(every=1))
    run(o, dict.fromkeys("ab", honest), loss=Slow())
    assert [version for version, _ in lines] == [0, 1, 2, 3, 4]
    assert all(count >= version for version, count in lines)


def test_the_numbers_of_a_version_equal_those_by_hand(tmp_path):
    """Two clients, with jobs of 1 and 4 s, send known updates of length 5.

    Client a has a quarter of the tokens.
    """
    sends = {("a", 0): (3, 4), ("b", 0): (4, 3), ("a", 1): (0, 5), ("b", 1): (5, 0)}

    def client(job):
        delta = np.zeros(SIZE, np.float32)
        delta[:2] = sends[job.client, job.number]
        return [(0.0, reply_with(job, delta, 128 if job.client == "a" else 384))]

    fleet = FleetOptions("constant", step_seconds=[0.1, 0.4])  # 10 steps
    done = run_virtual(
        tmp_path, dict.fromkeys("ab", client), FedAvg(), name="cohort", rounds=2, fleet=fleet
    )
    start, first, second = done.metrics
    # D = (3, 4) / 4 + (4, 3) * 3 / 4 = (3.75, 3.25),
    # then (0, 5) / 4 + (5, 0) * 3 / 4 = (3.75, 1.25)
    assert first["step_norm"] == pytest.approx((3.75**2 + 3.25**2) ** 0.5)
    assert second["step_norm"] == pytest.approx((3.75**2 + 1.25**2) ** 0.5)
    between = 3.75 * 3.75 + 3.25 * 1.25
    assert first["step_correlation"] is None
    assert second["step_correlation"] == pytest.approx(
        between / (first["step_norm"] * second["step_norm"]), abs=1e-6
    )
    assert (first["cosine"], second["cosine"]) == (
        pytest.approx(24 / 25),
        pytest.approx(0.0, abs=1e-9),
    )
    for record in (first, second):
        assert (
            record["update_norm"] == pytest.approx(5.0) and record["mean_weight"] == (128 + 384) / 2
        )
        assert record["idle_share"] == {"a": 0.75, "b": 0.0}
    assert first["tokens_by_client"] == {"a": 128, "b": 384}
    assert second["tokens_by_client"] == {"a": 256, "b": 768}
    assert [record["virtual_seconds"] for record in done.metrics] == [None, 4.0, 8.0] and start[
        "idle_share"
    ] == {}
    assert [record["tokens"] for record in done.metrics] == [0, 512, 1024]
