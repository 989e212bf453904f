"""Where and in which precision to compute, each choice with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedgpt.core.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """A device and a dtype for forward and backward; the master weights are always float32."""

    device: str
    dtype: str  # fp32, bf16
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]


def choose_compute(device: str = "auto", precision: str = "auto", private: bool = False) -> Compute:
    """Device and dtype for options `runtime.device` and `local.precision`; values are checked by
    the configuration.

    `private`: gradients are clipped one by one, in fp32. Raises ConfigError for a GPU where there
    is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        has = "is built without CUDA" if torch.version.cuda is None else "finds none"
        raise ConfigError(
            [f"runtime.device=cuda: no GPU here, torch {torch.__version__} {has}; take auto or cpu"]
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if private or precision != "auto":
        asked = (
            "privacy=example clips gradients in fp32" if private else "local.precision asks for it"
        )
        return Compute(device, "fp32" if private else precision, asked)
    if device == "cuda":
        if torch.cuda.is_bf16_supported():
            return Compute(device, "bf16", "the GPU has bf16 units")
        return Compute(device, "fp32", "the GPU has no bf16 units")
    known = _has_amx()
    if known is None:
        # a timing would differ from process to process, and server and clients must choose the same
        # dtype
        return Compute(device, "fp32", "this torch cannot tell whether the CPU has bf16 units")
    if known:
        return Compute(device, "bf16", "this CPU has AMX bf16 units")
    return Compute(device, "fp32", "this CPU has no AMX bf16 units")


def repeat_exactly(device: str) -> None:
    """From now on the same work on the same GPU has the same bits, as on a CPU; for the whole
    process.

    Costs 0 to 6 % of a step (H100); an operation that cannot is a RuntimeError of torch.
    """
    if device == "cuda":
        import torch

        # read with the first matrix product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # else every torch.empty is written with NaN first
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch

    count = torch.cuda.device_count()
    named = [
        name.strip()
        for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        if name.strip()
    ]
    return tuple(named[:count] or map(str, range(count)))


def choose_workers(workers: int, threads: int, gpus: int, clients: int) -> tuple[int, int, str]:
    """(worker processes, torch threads of each, reason) for `runtime.workers` and
    `runtime.threads`, 0 = choose.

    One process per core with one thread each beats one process with many threads on small models,
    and processes x threads above the number of cores collapses, because waiting threads spin. With
    `gpus` > 0 it is one process for each of them. More processes than `clients` at work would idle.
    """
    if gpus:
        chosen = min(clients, workers or gpus)
        why = f"{gpus} GPU{'s' * (gpus > 1)}, {'as asked' if workers else 'one process for each'}"
        return chosen, threads or max(1, cores() // chosen), why
    available = cores()
    chosen = min(clients, workers or max(1, available // max(threads, 1)))
    each = threads or max(1, available // chosen)
    return (
        chosen,
        each,
        f"{available} cores, {'as asked' if workers or threads else 'one process per core'}",
    )


def _has_amx() -> bool | None:
    """Whether the CPU has AMX tiles; None where this torch cannot say."""
    import torch

    # private: absent in other torch versions
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return None if probe is None else bool(probe())
