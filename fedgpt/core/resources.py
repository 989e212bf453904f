"""What a run uses of this machine: the same answer for the server, the launcher and every client
process.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedgpt.core.device import Compute, choose_compute, choose_workers, visible_gpus
from fedgpt.core.options import RunOptions

MOST_WAITING = 32  # processes of clients that mostly sleep


@dataclass(frozen=True)
class Resources:
    """Device, dtype, processes and threads, each chosen or as asked."""

    compute: Compute
    workers: int
    threads: int  # of each worker: bit-identity depends on it
    reason: str
    gpus: tuple[str, ...] = ()  # which the workers share, by the names of CUDA_VISIBLE_DEVICES

    @property
    def workers_text(self) -> str:
        """Workers and threads with their reason, as the opening prints them."""
        return (
            f"{self.workers} worker{_s(self.workers)} x {self.threads} thread{_s(self.threads)}"
            f" ({self.reason})"
        )


def resources_for(options: RunOptions, clients: int) -> Resources:
    """The machine for a run with `clients` clients, of whom `pace.clients` train at the same
    time.
    """
    runtime = options.runtime
    compute = choose_compute(
        runtime.device, options.local.precision, options.privacy.unit == "example"
    )
    gpus = visible_gpus() if compute.device == "cuda" else ()
    together = min(options.pace.clients or clients, clients)
    if options.clock == "real" and options.fleet.name != "none" and not runtime.workers:
        reason = "one process per client in flight: a simulated fleet mostly waits"
        return Resources(compute, min(together, MOST_WAITING), runtime.threads or 1, reason, gpus)
    return Resources(
        compute, *choose_workers(runtime.workers, runtime.threads, len(gpus), together), gpus
    )


def _s(count: int) -> str:
    return "s" * (count != 1)
