"""The downlink: a version has the same bits at every client, whichever steps a client received."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_transport import honest
from support.harness import options, run

from fedgpt.client.state import MODELS, ClientStore
from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import Job, Reply, ServerState
from fedgpt.flower.messages import job_bytes, params_record
from fedgpt.update.downlink import STEPS, Published, joined, rebuilt, step_codec

SIZE = 3000
steps = pytest.mark.parametrize("downlink", STEPS)


def walk(versions: int, seed: int = 0) -> list[ServerState]:
    """A model that changes a little at every version."""
    rng = np.random.default_rng(seed)
    params = [rng.standard_normal(SIZE).astype(np.float32)]
    for _ in range(versions):
        params.append(params[-1] + np.float32(0.01) * rng.standard_normal(SIZE).astype(np.float32))
    return [ServerState(vector, version) for version, vector in enumerate(params)]


@steps
@settings(max_examples=25, deadline=None)
@given(visits=st.lists(st.integers(1, 12), max_size=5), seed=st.integers(0, 99))
def test_any_sequence_of_steps_to_a_version_gives_the_same_bits(downlink, visits, seed):
    published, cached, mine = Published(downlink, {}), -1, None
    for state in walk(12, seed):
        vector = published.advance(state)
        if state.version not in visits:
            continue
        known = published.steps(cached, state.version)
        mine = (
            vector.copy()
            if known is None
            else rebuilt(mine, joined(known), downlink)
            if known
            else mine
        )
        cached = state.version
        assert mine.tobytes() == vector.tobytes()
        assert known is None or sum(step.nbytes for step in known) < vector.nbytes


@steps
def test_the_error_of_steps_does_not_accumulate(downlink):
    """After 200 versions the error of the published model is still that of one step."""
    published = Published(downlink, {})
    errors = []
    for state in walk(200):
        errors.append(float(np.linalg.norm(published.advance(state) - state.params)))
    moved = np.float32(0.01) * np.sqrt(SIZE)
    assert max(errors) < {"int8": 0.02, "int4": 0.35}[downlink] * moved
    assert np.mean(errors[150:]) < 1.5 * np.mean(errors[2:50])


@steps
def test_a_restart_publishes_the_same_bits(downlink):
    states = walk(9)
    without, first = Published(downlink, {}), Published(downlink, {})
    for state in states[:5]:
        without.advance(state), first.advance(state)
    second = Published(downlink, first.memory())
    for state in states[5:]:
        assert without.advance(state).tobytes() == second.advance(state).tobytes()
        ours, theirs = without.steps(3, state.version), second.steps(3, state.version)
        assert (ours is None) == (theirs is None)
        assert ours is None or joined(ours).tobytes() == joined(theirs).tobytes()


def test_without_steps_no_array_is_kept():
    state = walk(1)[1]
    assert Published("fp32", {}).advance(state) is state.params
    assert Published("bf16", {}).steps(0, 1) is None and Published("bf16", {}).memory() == {}


@steps
def test_damaged_steps_are_refused(downlink):
    codec = step_codec(downlink)
    payload = codec.encode(np.ones(SIZE, np.float32))
    payload[:4] = 255  # a scale that is NaN
    with pytest.raises(UpdateRejected):
        rebuilt(np.zeros(SIZE, np.float32), payload, downlink)


def test_a_client_keeps_the_latest_models(tmp_path):
    store = ClientStore(tmp_path, "run", "ann")
    for version in range(7):
        store.save_model(version, np.full(3, version, np.float32))
    assert store.load_model(6).tolist() == [6, 6, 6] and store.load_model(7 - MODELS) is not None
    assert store.load_model(6 - MODELS) is None and store.load_model(7) is None
    # the server has started again from an older checkpoint
    store.save_model(3, np.full(3, 30, np.float32))
    assert store.load_model(3).tolist() == [30, 30, 30] and store.load_model(6) is None


@pytest.mark.parametrize("left", [0, 5, 80])
def test_a_cached_model_that_a_power_cut_left_incomplete_is_not_used(tmp_path, left):
    store = ClientStore(tmp_path, "run", "ann")
    store.save_model(3, np.ones(3, np.float32))
    (path,) = store.folder.iterdir()
    path.write_bytes(path.read_bytes()[:left])
    assert store.load_model(3) is None


def stepping(folder: Path, rounds: int = 6):
    o = options(folder, rounds=rounds)
    o.update.downlink = "int8"
    return o


def test_the_server_sends_steps_to_clients_with_a_cached_version(tmp_path):
    outcome = run(stepping(tmp_path), dict.fromkeys("abc", honest))
    assert [job.plan.cached_version for job in outcome.jobs if job.client == "a"] == [
        -1,
        0,
        1,
        2,
        3,
        4,
    ]
    later = outcome.jobs[-1]
    record = params_record(later)["flat"].numpy()
    assert (
        record.nbytes == sum(step.nbytes for step in later.model_deltas) < later.params.nbytes / 3
    )
    assert job_bytes(later) < record.nbytes + 1000
    assert later.params.tobytes() != outcome.server.state.params.tobytes()


def test_a_client_that_lost_its_cached_model_gets_the_complete_one(tmp_path):
    """The same job is sent again, and the weights are the same as without the loss."""

    def forgetful(job: Job):
        if job.plan.cached_version >= 0 and job.version == 3:
            return [
                (0.0, Reply(job.client, job.number, error="code 2: LookupError: not here any more"))
            ]
        return honest(job)

    uninterrupted = run(stepping(tmp_path / "uninterrupted"), dict.fromkeys("abc", honest))
    outcome = run(stepping(tmp_path / "lost"), {**dict.fromkeys("ab", honest), "c": forgetful})
    assert (
        np.array_equal(outcome.params, uninterrupted.params)
        and outcome.server.totals.rejected == {}
    )
    assert [(job.number, job.plan.cached_version) for job in outcome.jobs if job.client == "c"][
        3:5
    ] == [
        (3, 2),
        (3, -1),
    ]


def test_a_restarted_run_ends_with_the_same_weights(tmp_path):
    uninterrupted = run(stepping(tmp_path / "uninterrupted"), dict.fromkeys("abc", honest))
    run(stepping(tmp_path / "interrupted", rounds=3), dict.fromkeys("abc", honest))
    again = run(stepping(tmp_path / "interrupted"), dict.fromkeys("abc", honest))
    assert np.array_equal(again.params, uninterrupted.params)
