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
def test_every_worker_gets_a_share_of_a_gpu(workers, gpus):
    found = settings(workers, gpus)
    share = found["client-resources-num-gpus"]
    assert found["init-args-num-gpus"] == gpus and 0 < share <= 1, (
        "no worker reserves more than one GPU"
    )
    assert gpus * int(1 / share + 1e-9) >= workers
    assert found["init-args-num-cpus"] == workers * found["client-resources-num-cpus"], (
        "no more workers start than the options ask for"
    )
