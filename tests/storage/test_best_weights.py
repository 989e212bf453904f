"""The best weights: written to a file, restored after a regression, the same after a restart."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.fake_transport import honest
from support.harness import options, run

from fedgpt.aggregate.fedavgm import FedAvgM
from fedgpt.core.faults import Injected, injected
from fedgpt.core.options import CheckpointOptions

CLIENTS = dict.fromkeys("abc", honest)
LOSS = {0: 5.0, 1: 4.0, 2: 3.0, 3: 3.5, 4: 2.9, 5: 9.0, 6: 2.95}


def kept(folder) -> np.ndarray:
    return load_file(folder / "checkpoints" / "best.safetensors")["params"]


def test_the_file_holds_the_version_with_the_lowest_loss(tmp_path):
    until_4 = run(options(tmp_path / "four", rounds=4), CLIENTS, loss=LOSS)
    run(options(tmp_path / "six", rounds=6), CLIENTS, loss=LOSS)
    assert np.array_equal(kept(tmp_path / "six"), until_4.params)


def test_checkpoint_best_false_writes_no_best_weights(tmp_path):
    o = options(tmp_path, rounds=2)
    o.checkpoint = CheckpointOptions(best=False)
    run(o, CLIENTS, loss=LOSS)
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()


def rollback_options(folder, rounds=6, share=0.0):
    o = options(folder, rounds=rounds)
    o.evaluate.rollback = share
    return o


def test_a_regression_restores_the_best_weights_and_their_momentum(tmp_path):
    outcome = run(rollback_options(tmp_path / "a"), CLIENTS, FedAvgM(), loss=LOSS)
    assert [m["restored"] for m in outcome.metrics] == [None, None, None, 2, None, 4, 4]
    assert outcome.version == 6, "version numbers continue"
    four = run(rollback_options(tmp_path / "b", rounds=4), CLIENTS, FedAvgM(), loss=LOSS)
    assert np.array_equal(outcome.params, four.params)
    ours, expected = outcome.server.state.memory, four.server.state.memory
    assert ours.keys() == expected.keys() and all(
        np.array_equal(ours[name], expected[name]) for name in expected
    )
    assert [m["loss"] for m in outcome.metrics] == list(LOSS.values()), (
        "the records keep the scores"
    )


def test_a_small_regression_may_be_allowed(tmp_path):
    outcome = run(rollback_options(tmp_path, share=0.2), CLIENTS, loss=LOSS)
    assert [m["restored"] for m in outcome.metrics] == [None] * 5 + [4, None]


def test_all_versions_are_compared_with_the_best_and_not_with_the_one_before(tmp_path):
    """5.0 is exactly as much worse as is allowed."""
    loss = {0: 9.0, 1: 4.0, 2: 4.5, 3: 5.0, 4: 5.25}
    outcome = run(rollback_options(tmp_path, rounds=4, share=0.25), CLIENTS, loss=loss)
    assert [m["restored"] for m in outcome.metrics] == [None] * 4 + [1]


def test_a_loss_of_nan_is_a_regression(tmp_path):
    outcome = run(
        rollback_options(tmp_path, rounds=2), CLIENTS, loss={0: 5.0, 1: 4.0, 2: float("nan")}
    )
    assert outcome.metrics[2]["restored"] == 1


@pytest.mark.parametrize(
    "fault", ["evaluated:4", "aggregate:4", "aggregate:6", "checkpoint.committed:6"]
)
def test_a_restarted_run_rolls_back_as_the_uninterrupted_run_does(tmp_path, fault):
    reference = run(rollback_options(tmp_path / "reference"), CLIENTS, FedAvgM(), loss=LOSS)
    o = rollback_options(tmp_path / "interrupted")
    with injected(f"{fault}:raise"), pytest.raises(Injected):
        run(o, CLIENTS, FedAvgM(), loss=LOSS)
    again = run(o, CLIENTS, FedAvgM(), loss=LOSS)
    assert np.array_equal(again.params, reference.params)
    ours, expected = again.server.state.memory, reference.server.state.memory
    assert ours.keys() == expected.keys() and expected
    assert all(np.array_equal(ours[name], expected[name]) for name in expected)
    assert [m["restored"] for m in again.metrics] == [m["restored"] for m in reference.metrics]
    assert np.array_equal(kept(tmp_path / "interrupted"), kept(tmp_path / "reference"))


def test_a_best_version_after_the_checkpoint_is_kept_with_its_loss(tmp_path):
    """A restart must not replace better weights with worse ones."""
    o = options(tmp_path, rounds=4)
    o.checkpoint = CheckpointOptions(every=9)
    with injected("aggregate:4:raise"), pytest.raises(Injected):
        run(o, CLIENTS, loss={0: 5.0, 1: 4.0, 2: 2.0, 3: 3.0})
    before = kept(tmp_path)
    # as if other clients had come first
    run(o, CLIENTS, loss={0: 5.0, 1: 4.0, 2: 3.5, 3: 3.0, 4: 2.5})
    assert np.array_equal(kept(tmp_path), before)
