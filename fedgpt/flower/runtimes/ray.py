"""runtime=ray: Flower's simulation engine on Ray."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.core.runtimes import Runtime


@dataclass(frozen=True)
class Ray(Runtime):
    """A SuperLink in simulation mode, which starts one Ray actor for each worker."""

    name = "ray"
    limits = (
        'It needs the extra "ray" (pip install ".[ray]" in a clone).',
        "Ray does not report how many clients share a core: with more clients than cores,"
        " strategy=auto mistakes clients that wait for a core for slow ones.",
        "A client process that hangs does not end at the deadline, only after runtime.watchdog"
        " seconds.",
    )

    def problems(self, options: RunOptions, clients: int) -> Iterator[str]:
        """Ray has to be installed."""
        if importlib.util.find_spec("ray") is None:
            yield (
                'runtime=ray: Ray is not installed; pip install ".[ray]" in a clone, or take'
                " runtime=pool"
            )

    def start(
        self,
        options: RunOptions,
        clients: int,
        resources: Resources,
        environment: Mapping[str, str],
    ) -> None:
        """Run the server and the clients in processes that Flower's simulation engine starts."""
        from fedgpt.flower.local_superlink import local_superlink

        with local_superlink(options.run_dir, environment, ["--simulation"]) as link:
            link.submit(options, ["--federation-config", simulation_settings(clients, resources)])


def simulation_settings(clients: int, resources: Resources) -> str:
    """The settings of Flower's simulation engine: one Ray actor per worker.

    Each actor gets its share of the CPUs and GPUs.
    """
    settings: dict[str, float] = {
        "num-supernodes": clients,
        "client-resources-num-cpus": resources.threads,
        "init-args-num-cpus": resources.workers * resources.threads,
    }
    if gpus := len(resources.gpus):  # Ray hides the GPUs from an actor that asks for none
        # a share of one GPU: Ray never gives an actor parts of two
        share = 1 / math.ceil(resources.workers / gpus)
        settings |= {"client-resources-num-gpus": share, "init-args-num-gpus": gpus}
    return " ".join(f"{name}={value}" for name, value in settings.items())
