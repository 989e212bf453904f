"""runtime=superlink: Flower's deployment programs, all of them on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources
from fedgpt.core.runtimes import Runtime

MOST_NODES = 16  # largest number of clients; a SuperNode is two Python processes of about 340 MB


@dataclass(frozen=True)
class SuperLink(Runtime):
    """A SuperLink on the loopback interface and one SuperNode for each client."""

    name = "superlink"
    limits = (
        f"It takes at most {MOST_NODES} clients, as each client is two processes.",
        "A job costs some seconds more than on the pool: a SuperNode polls for messages, and starts"
        " a Python process for each.",
        "A job cannot be cancelled: its late reply is rejected when it arrives.",
    )

    def problems(self, options: RunOptions, clients: int) -> Iterator[str]:
        """The number of clients is limited."""
        if clients > MOST_NODES:
            yield (
                "runtime=superlink: starts one SuperNode per client, and there are"
                f" {clients} clients; take at most {MOST_NODES} (partition.clients=2), or"
                " runtime=pool"
            )

    def start(
        self,
        options: RunOptions,
        clients: int,
        resources: Resources,
        environment: Mapping[str, str],
    ) -> None:
        """Run a SuperLink, its SuperNodes and the server in separate processes."""
        from fedgpt.flower.local_superlink import local_superlink

        gpus = resources.gpus
        with local_superlink(options.run_dir, environment) as link:
            for index in range(clients):
                link.start_node(index, clients, gpus[index % len(gpus)] if gpus else None)
            link.submit(options)
