"""The resources of this machine that a run uses; the launcher and the server choose the same
values.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fedgpt.core.device import Compute, choose_compute, choose_workers, visible_gpus
from fedgpt.core.options import RunOptions

MOST_WAITING = 32  # largest number of processes if the clients of a simulated fleet mostly wait


@dataclass(frozen=True)
class Resources:
    """Device, dtype, processes and threads of a run, from the options or chosen automatically."""

    compute: Compute
    workers: int  # number of client processes on this machine
    threads: int  # torch threads of each process; the bits of the weights depend on it
    reason: str  # reason for the numbers of workers and threads
    gpus: tuple[str, ...] = ()  # GPUs that the workers share, named as in CUDA_VISIBLE_DEVICES

    @property
    def workers_text(self) -> str:
        """Workers and threads with their reason, printed at the start of a run."""
        if not self.workers:
            return f"{self.threads} thread{_s(self.threads)} for the evaluation; {self.reason}"
        return (
            f"{self.workers} worker{_s(self.workers)} x {self.threads} thread{_s(self.threads)}"
            f" ({self.reason})"
        )


def resources_for(options: RunOptions, clients: int) -> Resources:
    """The resources of a run with `clients` clients, of which `pace.clients` train at a time."""
    runtime = options.runtime
    compute = choose_compute(
        runtime.device, options.local.precision, options.privacy.unit == "example"
    )
    gpus = visible_gpus() if compute.device == "cuda" else ()
    # with coins, any number of clients may train at a time
    together = min((options.pace.rate is None and options.pace.clients) or clients, clients)
    if options.corpus.at_sites:
        reason = "clients train on their own machines"
        workers, threads = 0, runtime.threads or os.cpu_count() or 1
    elif options.clock == "real" and options.fleet.name != "none" and not runtime.workers:
        reason = "one process per client in flight, as a simulated fleet mostly waits"
        workers, threads = min(together, MOST_WAITING), runtime.threads or 1
    else:
        asked = runtime.workers, runtime.threads
        workers, threads, reason = choose_workers(*asked, len(gpus), together)
    # these have as many processes as they need, and the threads that give the bits of the others
    if fixed := {"inprocess": 1, "superlink": clients}.get(runtime.name):
        workers, reason = fixed, f"runtime={runtime.name}"
    return Resources(compute, workers, threads, reason, gpus)


def _s(count: int) -> str:
    return "s" * (count != 1)
