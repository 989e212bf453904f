"""The device, the dtype, the processes and the threads of a run, each choice with its reason."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgpt.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """The device and dtype of the forward and backward pass; master weights are always float32."""

    device: str
    dtype: str  # fp32, bf16
    reason: str  # reason for the choice, printed at the start of a run

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]


def choose_compute(device: str = "auto", precision: str = "auto", private: bool = False) -> Compute:
    """Device and dtype for the options `runtime.device` and `local.precision`.

    `private` training clips per-example gradients, always in fp32. Raises ConfigError if the
    options require a GPU and torch finds none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        has = "is built without CUDA" if torch.version.cuda is None else "finds none"
        raise ConfigError(
            f"runtime.device=cuda: no GPU is available, torch {torch.__version__} {has}; take auto"
            " or cpu"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if private or precision != "auto":
        asked = "privacy=example clips gradients in fp32" if private else "set by local.precision"
        return Compute(device, "fp32" if private else precision, asked)
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return Compute(device, "bf16", "the GPU has bf16 units")
        return Compute(device, "fp32", "the GPU has no bf16 units")
    known = _has_amx()
    if known is None:
        # a benchmark could decide differently in each process, but the server and the clients must
        # choose the same dtype
        return Compute(device, "fp32", "this torch cannot tell whether the CPU has bf16 units")
    if known:
        return Compute(device, "bf16", "this CPU has AMX bf16 units")
    return Compute(device, "fp32", "this CPU has no AMX bf16 units")


def repeat_exactly(device: str) -> None:
    """Make operations on a GPU deterministic in this process, as they are on a CPU.

    It costs 0 to 6 % of a step on an H100. An operation without a deterministic kernel then raises
    torch's RuntimeError.
    """
    if device == "cuda":
        import torch

        # cuBLAS reads the variable at the first matrix product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # otherwise every torch.empty is filled with NaN, which takes time
        deterministic: Any = torch.utils.deterministic
        deterministic.fill_uninitialized_memory = False


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory that this process may use, or 0 if the system does not say."""
    limits = [
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    ]
    names = ("SC_PHYS_PAGES", "SC_PAGE_SIZE")
    known = [os.sysconf(names[0]) * os.sysconf(names[1])] if {*names} <= {*os.sysconf_names} else []
    for limit in limits:  # of a container
        with suppress(OSError, ValueError):  # no such limit, or "max"
            known.append(int(limit.read_text()))
    return min(known, default=0)


# what a RuntimeError says if torch, or a library that it calls, could not allocate memory
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN, matrix products on a CPU
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)

M_MMAP_THRESHOLD = -3  # the number of an option of glibc's malloc


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception of torch or numpy says that memory could not be allocated."""
    while isinstance(error, RuntimeError | MemoryError):
        # torch has a class for GPUs only
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if any(words in str(error) for words in NO_MEMORY):
            return True
        error = error.__context__  # leaving the capture of a CUDA graph fails as well
    return False


def free_memory(device: str) -> None:
    """Return to the system what no tensor uses, before a computation is tried again."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        return
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    # glibc keeps freed memory for later, which a limit of the process counts; and oneDNN asks the
    # system for the memory of its kernels, and fails with none left
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "malloc_trim"):  # other C libraries do not have it
        glibc.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # tensors from 1 MiB on are returned at once
        glibc.malloc_trim(0)


def may_have_gpu() -> bool:
    """Whether this machine may have a GPU for torch, as far as is known without importing it.

    Its driver has a device: NVIDIA's, AMD's, or that of Windows for Linux.
    """
    return any(any(Path("/dev").glob(name)) for name in ("nvidia[0-9]*", "kfd", "dxg"))


def visible_gpus() -> tuple[str, ...]:
    """Names, as in CUDA_VISIBLE_DEVICES, of the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return tuple(named[:count] or map(str, range(count)))


def choose_workers(workers: int, threads: int, gpus: int, clients: int) -> tuple[int, int, str]:
    """(worker processes, torch threads of each, reason) for the options; 0 means "choose".

    On small models one process per core with one thread each is faster than one process with many
    threads. With more threads than cores in total it becomes very slow, because waiting threads
    spin. On GPUs it is one process for each GPU. There are never more processes than `clients`
    that train at the same time.
    """
    if gpus:
        chosen = min(clients, workers or gpus)
        why = f"{gpus} GPU{'s' * (gpus > 1)}, {'as set' if workers else 'one process for each'}"
        return chosen, threads or max(1, cores() // chosen), why
    available = cores()
    chosen = min(clients, workers or max(1, available // max(threads, 1)))
    each = threads or max(1, available // chosen)
    return (
        chosen,
        each,
        f"{available} cores, {'as set' if workers or threads else 'one process per core'}",
    )


def _has_amx() -> bool | None:
    """Whether the CPU has AMX tiles; None if this version of torch cannot say."""
    import torch

    # a private function, which other versions of torch may not have
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return None if probe is None else bool(probe())
