"""Jobs that do not fit into the memory of a client, under a real limit of its process."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support.advice import advises
from support.limited_client import BATCH, do_job, limited_job, result, work_in

from fedgpt.client.fitting import OutOfMemory

HALF = 100  # megabytes beside the model, in which half of a batch fits


@pytest.mark.slow
@pytest.mark.parametrize("privacy", ["none", "example"])
def test_a_job_beyond_the_memory_of_its_process_is_split(tmp_path, privacy):
    done = limited_job(tmp_path, HALF, privacy)
    assert done.returncode == 0, done.stderr
    header, delta = result(tmp_path)
    told = [line for line in done.stderr.splitlines() if "does not fit into the memory" in line]
    size = int(told[-1].partition("in micro-batches of ")[2].split()[0])
    assert told[0].startswith(f"a micro-batch of {BATCH} sequences does not fit") and size < BATCH
    # this process has enough memory
    split = work_in(tmp_path, privacy)
    split._fitting.micro_batch = size
    same, expected = do_job(split)
    assert same["metrics"] == header["metrics"]
    np.testing.assert_array_equal(delta, expected)
    if privacy == "example":  # whose noise depends on the size, and whose metrics say nothing
        assert "micro_batch" not in header["metrics"]
        assert header["metrics"]["charged"] == 3, "its steps, once"
        return
    assert header["metrics"]["micro_batch"] == size
    whole_header, whole = do_job(work_in(tmp_path, privacy))
    assert "micro_batch" not in whole_header["metrics"]
    assert np.linalg.norm(delta - whole) < 1e-3 * np.linalg.norm(whole)


@pytest.mark.parametrize("beyond", [1, 5, 40])
def test_a_job_is_repeated_from_its_beginning_in_halves_that_later_jobs_begin_with(
    tmp_path, beyond, caplog
):
    """Every attempt above `beyond` sequences asks for more memory than any machine has."""
    fitting = work_in(tmp_path)._fitting
    tried: list[int] = []

    def job() -> int:
        tried.append(fitting.trainer.micro_batch)
        if tried[-1] > beyond:
            np.empty(1 << 46)
        return tried[-1]

    with caplog.at_level(logging.WARNING):
        found = fitting.run(job, private=False)
    halves = [64, 32, 16, 8, 4, 2, 1]
    assert tried == halves[: halves.index(found) + 1] and found <= beyond < 2 * found
    assert len(caplog.messages) == len(tried) - 1
    assert fitting.run(job, private=False) == found and tried[-2:] == [found, found]


def test_a_model_too_large_for_one_sequence_is_told_with_what_to_change(tmp_path):
    work = work_in(tmp_path, "none", "local.batch_size=3")
    with pytest.raises(OutOfMemory) as told:
        work._fitting.run(lambda: np.empty(1 << 46), private=False)
    assert "out of memory (cpu), also in micro-batches of 1 sequence instead of" in str(told.value)
    advises(
        told.value,
        "lower model.block_size=128, model.n_layer=2 or model.n_embd=64, or raise memory in the"
        " site's policy",
    )


def test_errors_of_another_kind_are_not_tried_again(tmp_path):
    fitting, tried = work_in(tmp_path)._fitting, []
    with pytest.raises(ZeroDivisionError):
        fitting.run(lambda: tried.append(1) or 1 / 0, private=False)
    assert tried == [1]
