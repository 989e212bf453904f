"""strategy=auto: when the server changes the pacing, that it is told, and that a restart knows."""

from __future__ import annotations

import numpy as np
import pytest
from engine.script import honest, reply_with
from engine.virtual_run import serve

from fedgpt.aggregate.auto import Auto, updates_gained
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.core.errors import Interrupted
from fedgpt.core.messages import Observed, ServerState
from fedgpt.core.options import FleetOptions


def trained(job):
    """A client that does what the job says: its first one is short."""
    return honest(job, tokens=64 * job.plan.steps)


FOUR = dict.fromkeys("abcd", trained)
EQUAL = FleetOptions("constant", step_seconds=[1.0])


def auto_run(folder, clients=FOUR, strategy=None, **more):
    return serve(folder, clients, strategy or Auto(), **{"name": "cohort", "rounds": 20, **more})


def switches(run):
    return [(round(about["seconds"], 1), about["pacing"]) for event, about in run.events if event == "pacing"]


def test_gain_is_what_the_note_says():
    assert updates_gained([10 * s for s in (0.58, 0.75, 1.51, 3.33)]) == pytest.approx(3.347, abs=1e-3)
    assert updates_gained([7.0] * 5) == pytest.approx(1.0) and updates_gained([]) == updates_gained([0.0]) == 1.0


def test_unequal_clients_make_it_asynchronous_within_the_first_round(tmp_path):
    """At 3.0 s three are back and one is not: it takes at least as long, and the others could have gone on."""
    run = auto_run(tmp_path)
    assert switches(run) == [(3.0, "buffer")]
    steps = [about["steps"] for event, about in run.events if event == "dispatch"]
    assert steps[:4] == [2] * 4 and set(steps[4:]) == {10}
    assert run.records[1]["accepted"] == 3 and all(record["accepted"] == 1 for record in run.records[2:])
    assert run.summary["tokens"] >= 20 * 4 * 640, "its length is counted in rounds of the cohort"


def test_equal_clients_keep_it_synchronous(tmp_path):
    run = auto_run(tmp_path, fleet=EQUAL)
    assert switches(run) == [] and {record["accepted"] for record in run.records[1:]} == {4}


def test_synchronous_it_is_the_uniform_mean(tmp_path):
    jobs = {"local": {"steps": 1}, "fleet": EQUAL, "tokens": 20 * 4 * 64}  # of one step, which cannot be shorter
    same = serve(tmp_path / "b", FOUR, DeltaSGD(), name="cohort", **jobs).summary["weights_sha256"]
    assert auto_run(tmp_path / "a", **jobs).summary["weights_sha256"] == same


def test_clients_that_become_alike_bring_the_rounds_back():
    state = ServerState(np.zeros(3, np.float32), 9)
    alike, apart = dict.fromkeys("abcd", 10.0), {"a": 10.0, "b": 10.0, "c": 10.0, "d": 40.0}
    assert Auto().choose_pacing(Observed("buffer", apart, {}), state).pacing == "buffer"
    choice = Auto().choose_pacing(Observed("buffer", alike, {}), state)
    assert choice.pacing == "cohort" and "alike" in choice.reason


def test_updates_that_grow_bring_the_rounds_back_and_keep_them(tmp_path):
    def growing(job):
        scale = 0.01 if job.task < 6 else 0.08  # below the norm limit, which is 10 times the usual
        rng = np.random.default_rng([*job.client.encode(), job.task])
        return [
            (
                0.0,
                reply_with(job, (scale * rng.standard_normal(job.params.size)).astype(np.float32), 64 * job.plan.steps),
            )
        ]

    run = auto_run(tmp_path, dict.fromkeys("abcd", growing), Auto(rest=5), rounds=30)
    told = [about for event, about in run.events if event == "pacing"]
    assert [about["pacing"] for about in told[:3]] == ["buffer", "cohort", "buffer"]
    assert "grown" in told[1]["reason"]
    assert told[2]["version"] - told[1]["version"] >= 5


def test_steps_that_undo_each_other_bring_the_rounds_back():
    state, strategy = ServerState(np.zeros(3, np.float32), 1), Auto()
    for _ in range(20):
        choice = strategy.choose_pacing(Observed("buffer", {"a": 1.0, "b": 9.0}, {"step_correlation": -0.9}), state)
        state = ServerState(state.params, state.version + 1, {**state.memory, **choice.memory})
        if choice.pacing == "cohort":
            break
    assert "undo" in choice.reason and int(state.memory["auto_rest"]) > state.version


@pytest.mark.parametrize("crash_at", [1, 8, 33])
def test_a_restart_goes_on_with_the_pacing_it_had(tmp_path, crash_at):
    whole = auto_run(tmp_path / "whole")

    def dies(job):
        if job.version == crash_at:
            raise KeyboardInterrupt
        return trained(job)

    with pytest.raises(Interrupted):
        auto_run(tmp_path / "cut", dict.fromkeys("abcd", dies))
    again = auto_run(tmp_path / "cut")
    assert again.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert again.server.pace.pacing(4) == whole.server.pace.pacing(4)
