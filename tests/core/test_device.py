"""Automatic choices of device, dtype, processes and threads, on simulated machines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.advice import advises

from fedgpt.core import device
from fedgpt.core.device import Compute, choose_compute, choose_workers, cores, visible_gpus
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions, RuntimeOptions
from fedgpt.core.resources import resources_for


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    "amx, dtype, reason",
    [
        (True, "bf16", "this CPU has AMX bf16 units"),
        (False, "fp32", "this CPU has no AMX bf16 units"),
    ],
)
def test_the_dtype_depends_on_the_cpu(monkeypatch, amx, dtype, reason):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert choose_compute() == Compute("cpu", dtype, reason)


def test_if_torch_cannot_detect_amx_every_process_takes_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert choose_compute() == Compute(
        "cpu", "fp32", "this torch cannot tell whether the CPU has bf16 units"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("amx", [True, False])
def test_a_requested_precision_is_used(monkeypatch, precision, amx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert choose_compute("cpu", precision) == Compute("cpu", precision, "set by local.precision")


@pytest.mark.parametrize("units, dtype", [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_used_if_available(monkeypatch, units, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: units)
    chosen = choose_compute()
    assert (chosen.device, chosen.dtype) == ("cuda", dtype) and "GPU" in chosen.reason
    assert choose_compute("cpu", "fp32").device == "cpu", "an option overrides detection"


@pytest.mark.parametrize("built, why", [(None, "is built without CUDA"), ("13.0", "finds none")])
def test_asking_for_a_missing_gpu_is_refused(monkeypatch, built, why):
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(
        ConfigError,
        match=rf"runtime.device=cuda: no GPU is available, torch .* {why}",
    ) as refused:
        choose_compute("cuda")
    advises(refused.value, "take auto or cpu")
    assert choose_compute("auto").device == choose_compute("cpu").device == "cpu"


def test_dtypes_map_to_those_of_torch():
    assert Compute("cpu", "fp32", "").torch_dtype is torch.float32
    assert Compute("cpu", "bf16", "").torch_dtype is torch.bfloat16


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert cores() == 3
    monkeypatch.delattr(device.os, "sched_getaffinity")
    monkeypatch.setattr(device.os, "cpu_count", lambda: None)
    assert cores() == 1


@pytest.mark.parametrize(
    "available, workers, threads, chosen",
    [
        (8, 0, 0, (8, 1, "8 cores, one process per core")),
        (8, 3, 0, (3, 2, "8 cores, as set")),
        (8, 0, 3, (2, 3, "8 cores, as set")),
        (8, 16, 0, (16, 1, "8 cores, as set")),
        (8, 0, 16, (1, 16, "8 cores, as set")),
        (8, 5, 5, (5, 5, "8 cores, as set")),
        (1, 0, 0, (1, 1, "1 cores, one process per core")),
    ],
)
def test_numbers_of_workers_and_threads(monkeypatch, available, workers, threads, chosen):
    monkeypatch.setattr(device, "cores", lambda: available)
    assert choose_workers(workers, threads, 0, 1000) == chosen


@given(st.integers(1, 256), st.integers(0, 300), st.integers(0, 300))
def test_workers_times_threads_stay_within_the_cores_unless_asked_for_more(
    available, workers, threads
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "cores", lambda: available)
        processes, each, reason = choose_workers(workers, threads, 0, 1000)
    assert processes >= 1 and each >= 1 and str(available) in reason
    assert processes == workers or not workers
    assert each == threads or not threads
    asked = max(workers, 1) * max(threads, 1)
    assert processes * each <= max(available, asked)


@pytest.mark.parametrize(
    "gpus, workers, threads, chosen",
    [(1, 0, 0, (1, 16)), (4, 0, 0, (4, 4)), (1, 2, 0, (2, 8)), (2, 0, 3, (2, 3))],
)
def test_one_process_per_gpu(monkeypatch, gpus, workers, threads, chosen):
    monkeypatch.setattr(device, "cores", lambda: 16)
    *numbers, reason = choose_workers(workers, threads, gpus, 1000)
    assert tuple(numbers) == chosen and f"{gpus} GPU" in reason


@pytest.mark.parametrize(
    "visible, count, names",
    [
        (None, 2, ("0", "1")),
        ("3,5", 2, ("3", "5")),
        ("GPU-1a, GPU-2b", 2, ("GPU-1a", "GPU-2b")),
        ("1,7", 1, ("1",)),
        ("-1", 0, ()),
    ],
)
def test_gpus_keep_the_names_that_this_process_knows_them_by(monkeypatch, visible, count, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == names


def test_the_number_of_processes_is_at_most_that_of_clients(monkeypatch):
    monkeypatch.setattr("fedgpt.core.device.cores", lambda: 8)
    assert choose_workers(0, 0, 0, 3)[:2] == (3, 2)
    assert choose_workers(0, 0, 0, 1)[:2] == (1, 8)
    assert choose_workers(6, 1, 0, 2)[:2] == (2, 1)


@pytest.mark.parametrize(
    ("runtime", "text"),
    [
        ("pool", "2 workers x 4 threads (8 cores, as set)"),
        ("inprocess", "1 worker x 4 threads (runtime=inprocess)"),
        ("superlink", "3 workers x 4 threads (runtime=superlink)"),
    ],
)
def test_the_opening_names_as_many_processes_as_there_are(monkeypatch, runtime, text):
    monkeypatch.setattr(device, "cores", lambda: 8)
    options = RunOptions(runtime=RuntimeOptions(runtime, workers=2, device="cpu"))
    assert resources_for(options, clients=3).workers_text == text
