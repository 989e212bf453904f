"""What a site's process may use of its machine: memory, threads and disk."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from fedgpt.client.policy import Policy, PolicyRefused
from fedgpt.client.site import Site
from fedgpt.core.device import choose_compute, memory
from fedgpt.core.errors import ConfigError, FedGPTError

# bytes of a disk that a site leaves free; the state of a model of 124 million parameters has as
# many
LEAST_FREE = 1 << 30


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which may not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def refuse_without_room(site: Site) -> None:
    """Raise PolicyRefused if what a message leaves behind may fill a disk of the site.

    A server chooses how many runs, models and tokenizers it sends.
    """
    for folder in (site.state_dir, site.cache_dir):
        if free_bytes(Path(folder).expanduser()) < LEAST_FREE:
            raise PolicyRefused(
                f"the last {LEAST_FREE >> 20} MiB of its disk for other uses",
                "and they are all that is left",
            )


def limit_process(policy: Policy) -> str:
    """Limit this process as the policy says; returns in words what holds, or an empty text.

    On a GPU the limit is of torch's allocations there. On a CPU it is of the memory that the
    process asks the system for (RLIMIT_DATA of Linux), not of its address space, in which torch and
    memory-mapped files take far more than they use. A job beyond the limit is split (fitting.py),
    or fails and the process goes on. Raises ConfigError where the limit cannot be enforced.
    """
    import torch

    if policy.threads is not None:
        torch.set_num_threads(policy.threads)
    if policy.memory is None:
        return ""
    if choose_compute(policy.device).device == "cuda":
        torch.cuda.set_per_process_memory_fraction(policy.memory)
        total = torch.cuda.get_device_properties(0).total_memory
        return f"at most {_gib(policy.memory * total)} of the GPU's {_gib(total)}"
    return _limit_data(policy.memory)


def _limit_data(share: float) -> str:
    total = memory()
    if not sys.platform.startswith("linux") or not total:
        raise ConfigError(
            f"memory={share:g}: without a GPU it can be enforced on Linux only; leave it out"
        )
    import resource

    limit = int(share * total)
    used = _data_bytes()
    if limit <= used:
        raise ConfigError(
            f"memory={share:g}: is {_gib(limit)} of {_gib(total)}, and the client uses"
            f" {_gib(used)} before its first job; raise it above {used / total:.2g}"
        )
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return f"at most {_gib(limit)} of the machine's {_gib(total)}"


def _data_bytes() -> int:
    """Bytes of this process that RLIMIT_DATA counts; raises FedGPTError if Linux does not say."""
    with Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    raise FedGPTError("/proc/self/status does not say how much memory this process uses")


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB"
