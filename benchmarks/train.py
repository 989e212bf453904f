"""Training speed of a client: fedgpt's trainer against a loop like nanoGPT's, on a CPU or a GPU.

    python benchmarks/train.py                          # nano and mini: 5 minutes on one core
    python benchmarks/train.py --models gpt2 --compile  # for a GPU
    python benchmarks/train.py --quick                  # a smoke run

A (fedgpt): a job of `Trainer.train`, as a client does it, from the model as a float32 vector in
    main memory to the delta as another one.
B (plain): the same model, batches, clipping and precision in a plain loop: autocast if A computes
    in bf16, fused AdamW with two parameter groups, clip_grad_norm_; on a GPU also batches from
    pinned memory, and TF32 for everything that is not bf16.
C (compiled, with --compile): B with torch.compile.

They take turns in one process. A figure is the median of the ratios in the same round, in wall
time. The first job of each, with compilation and the capture of CUDA graphs, is not timed.
`tokens_per_second` is A's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from common import machine

from fedgpt.config import compose
from fedgpt.core.device import Compute, choose_compute
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import Batches
from fedgpt.flower.launch import KEEP_HEAP
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT

TOKENS = np.random.default_rng(0).integers(4097, size=200_000)
VOCAB = 4097
Job = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="nano,mini", help="presets of conf/model (nano,mini)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of (5)")
    parser.add_argument("--steps", type=int, default=20, help="steps of a job (20)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (8)")
    parser.add_argument("--compile", action="store_true", help="also compare with torch.compile")
    parser.add_argument("--quick", action="store_true", help="a smoke run: nano, 2 rounds")
    chosen = parser.parse_args()
    if not KEEP_HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_HEAP, **os.environ})
    if chosen.quick:
        chosen.models, chosen.rounds, chosen.steps = "nano", 2, 2
    compute, about, figures = choose_compute(), machine(), {}
    print(f"{'model':<8}{'A: ms a step':>14}{'B over A':>10}{'C over A':>10}")
    for name in chosen.models.split(","):
        model, local = compose.load([f"model={name}"]).model, LocalOptions(batch_size=chosen.batch)
        jobs = {"fedgpt": fedgpt_job(model, local, compute, chosen.steps)}
        for kind in ("plain", "compiled")[: 2 if chosen.compile else 1]:
            jobs[kind] = plain_job(model, local, compute, chosen.steps, kind == "compiled")
        seconds = take_turns(jobs, chosen.rounds)
        ours = statistics.median(seconds["fedgpt"])
        gains = {
            kind: over(own, seconds["fedgpt"]) for kind, own in seconds.items() if kind != "fedgpt"
        }
        print(
            f"{name:<8}{1000 * ours / chosen.steps:>14.3f}"
            + "".join(f"{gain:>10.2f}" for gain in gains.values())
        )
        figures |= {f"{name}_{kind}_over_fedgpt": gain for kind, gain in gains.items()}
        figures[f"{name}_tokens_per_second"] = round(
            chosen.steps * local.batch_size * model.block_size / ours
        )
    job = {"rounds": chosen.rounds, "steps": chosen.steps, "batch": chosen.batch}
    print(json.dumps({**figures, **job, "model": chosen.models, "gpu": gpu_name(), **about}))


def take_turns(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in jobs}
    for number in range(rounds + 1):
        for kind, job in jobs.items():
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first round warms up
                seconds[kind].append(time.perf_counter() - began)
    return seconds


def fedgpt_job(model: ModelOptions, local: LocalOptions, compute: Compute, steps: int) -> Job:
    """A job as a client does it."""
    trainer = Trainer(model, VOCAB, local, compute)
    start = np.random.default_rng(1).normal(0, 0.02, trainer.layout.size).astype(np.float32)
    plan = Plan("benchmark", steps, 0, local.batch_size * model.block_size, 10**9)
    return lambda: trainer.train(
        start, Batches(TOKENS, model.block_size, local.batch_size, 0), plan, None
    )


def plain_job(
    model: ModelOptions, local: LocalOptions, compute: Compute, steps: int, compiled: bool
) -> Job:
    """The same steps in a plain loop."""
    gpt = GPT(model, VOCAB).to(compute.device).train()
    loss_of = torch.compile(gpt.loss) if compiled else gpt.loss
    matrices = [p for p in gpt.parameters() if p.dim() >= 2]
    others = [p for p in gpt.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": local.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=local.lr, betas=(local.beta1, local.beta2), fused=True)
    on_gpu, bf16 = compute.device == "cuda", compute.dtype == "bf16"

    def job() -> None:
        batches = Batches(TOKENS, model.block_size, local.batch_size, 0)
        torch.set_float32_matmul_precision("high")
        # the trainer needs the same bits every time; this loop does not
        torch.use_deterministic_algorithms(False)
        for _ in range(steps):
            inputs, targets = batches.next()
            if on_gpu:
                inputs, targets = (
                    x.pin_memory().to("cuda", non_blocking=True) for x in (inputs, targets)
                )
            with torch.autocast(compute.device, torch.bfloat16, enabled=bf16):
                loss = loss_of(inputs, targets)
            adamw.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), local.grad_clip)
            adamw.step()
        torch.use_deterministic_algorithms(on_gpu)
        torch.set_float32_matmul_precision("highest")

    return job


def over(own: list[float], reference: list[float]) -> float:
    """The median of the ratios in the same round."""
    return round(statistics.median(a / b for a, b in zip(own, reference, strict=True)), 3)


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
