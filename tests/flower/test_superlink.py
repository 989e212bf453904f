"""The settings of Flower's simulation engine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedgpt.core.device import Compute
from fedgpt.core.resources import Resources
from fedgpt.flower.runtimes.ray import simulation_settings


def settings(workers: int, gpus: int) -> dict[str, float]:
    compute = Compute("cuda" if gpus else "cpu", "fp32", "test")
    names = tuple(map(str, range(gpus)))
    text = simulation_settings(8, Resources(compute, workers, 3, "test", names))
    return {name: float(value) for name, _, value in (part.partition("=") for part in text.split())}


def test_without_gpus_ray_divides_the_cpus():
    assert settings(2, 0) == {
        "num-supernodes": 8,
        "client-resources-num-cpus": 3,
        "init-args-num-cpus": 6,
    }


@given(st.integers(1, 40), st.integers(1, 9))
def test_every_worker_finds_a_place_on_a_gpu(workers, gpus):
    told = settings(workers, gpus)
    share = told["client-resources-num-gpus"]
    assert told["init-args-num-gpus"] == gpus and 0 < share <= 1, (
        "one that a worker cannot use is not held by it"
    )
    assert gpus * int(1 / share + 1e-9) >= workers
    assert told["init-args-num-cpus"] == workers * told["client-resources-num-cpus"], (
        "and no more than asked start"
    )
