"""How fast a client trains: our trainer against a loop in nanoGPT's manner, on a CPU or a GPU.

    python benchmarks/train.py                          # nano and mini, five rounds, about five minutes on one core
    python benchmarks/train.py --models gpt2 --compile  # for a GPU
    python benchmarks/train.py --quick                  # a smoke run

A (fedgpt): whole jobs of `Trainer.train`, as a client does them: the model comes in as a float32
vector in main memory,
    the delta goes out as one.
B (plain): the same model, batches, clipping and precision as one writes it: autocast where A
computes in bf16, AdamW
    with fused kernels and two groups, clip_grad_norm_; on a GPU batches from pinned memory and TF32
    for what is left.
C (compiled, with --compile): B with torch.compile.

They take turns in one process. A figure is the median of the ratio in the same round, in wall time;
compiling, recording and the first job of each lie outside. `tokens_per_second` are A's.
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
    parser.add_argument("--rounds", type=int, default=5, help="of which medians are taken (5)")
    parser.add_argument("--steps", type=int, default=20, help="of a job (20)")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step (8)")
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile, too")
    parser.add_argument(
        "--quick", action="store_true", help="the nano model, two rounds of two steps: no figures"
    )
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
    shape = {
        "rounds": chosen.rounds,
        "steps": chosen.steps,
        "batch": chosen.batch,
        "model": chosen.models,
    }
    print(json.dumps({**figures, **shape, "gpu": gpu_name(), **about}))


def take_turns(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Seconds of every job in every round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in jobs}
    for number in range(rounds + 1):
        for kind, job in jobs.items():
            began = time.perf_counter()
            job()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:  # the first warms up
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
    """The same steps as one writes them."""
    gpt = GPT(model, VOCAB).to(compute.device).train()
    loss_of = torch.compile(gpt.loss) if compiled else gpt.loss
    groups = [
        {
            "params": [p for p in gpt.parameters() if p.dim() >= 2],
            "weight_decay": local.weight_decay,
        },
        {"params": [p for p in gpt.parameters() if p.dim() < 2], "weight_decay": 0.0},
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
    """Median of the ratios, round by round."""
    return round(statistics.median(a / b for a, b in zip(own, reference, strict=True)), 3)


def gpu_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
