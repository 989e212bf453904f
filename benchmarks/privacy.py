"""The cost of DP-SGD in a training step: book-keeping and Opacus' hooks against a plain step.

    python benchmarks/privacy.py            # mini model, ten rounds: about 3 minutes on one core
    python benchmarks/privacy.py --quick    # a smoke run on a tiny model

`plain` is the trainer's step: batch, forward, backward, clipping of the gradient's norm, fused
AdamW. `bookkeeping` also clips the gradient of every example and adds secure noise. `hooks` is
Opacus as in its tutorial: GradSampleModule in hooks mode and DPOptimizer around torch's fused
AdamW, with torch's noise. `hooks_here` is fedgpt's other engine, which takes Opacus' per-example
gradients and adds them up itself, with secure noise.

All steps are in fp32 and on the same examples (sampling probability 1), with the heap settings of
the pool's workers. They take turns; a ratio is the median of the ratios in the same round, in wall
time.
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

from fedgpt.core.device import choose_compute
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import Batches, Blocks
from fedgpt.flower.launch import KEEP_HEAP
from fedgpt.local.private import PrivateSteps
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream

MINI = ModelOptions(n_layer=6, n_head=6, n_embd=384, block_size=256, positions="rotary")
TINY = ModelOptions(n_layer=2, n_head=2, n_embd=32, block_size=16, positions="rotary")
VOCAB = 4097
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="rounds to take medians of (10)")
    parser.add_argument("--batch", type=int, default=8, help="examples in a step (8)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny model, two rounds")
    chosen = parser.parse_args()
    if not KEEP_HEAP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**KEEP_HEAP, **os.environ})
    model, rounds = (TINY, 2) if chosen.quick else (MINI, chosen.rounds)
    about = machine("fp32")
    local = LocalOptions(batch_size=chosen.batch)
    steps = {
        "plain": plain(model, local),
        "bookkeeping": private(model, local, "bookkeeping"),
        "hooks": stock_opacus(model, local),
        "hooks_here": private(model, local, "opacus"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # not timed: allocates memory and warms caches
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    print(f"{'step':<12}{'seconds':>10}{'over plain':>12}")
    for name, own in seconds.items():
        print(f"{name:<12}{statistics.median(own):>10.4f}{over(own, seconds['plain']):>12.3f}")
    ratios = {
        "bookkeeping_over_plain": over(seconds["bookkeeping"], seconds["plain"]),
        "bookkeeping_over_hooks": over(seconds["bookkeeping"], seconds["hooks"]),
        "hooks_over_plain": over(seconds["hooks"], seconds["plain"]),
    }
    shape = {"rounds": rounds, "batch": chosen.batch, "block_size": model.block_size}
    print(json.dumps({**ratios, **shape, **about}))


def plain(model: ModelOptions, local: LocalOptions) -> Step:
    """A step without privacy."""
    trainer = Trainer(model, VOCAB, local, choose_compute("auto", "fp32"))
    batches = Batches(tokens_of(model, local), model.block_size, local.batch_size, seed=0)

    def step() -> None:
        trainer.gradient.fill(batches, local.accumulate)
        trainer._clip()
        trainer.optimizer.step(1e-3)

    return step


def private(model: ModelOptions, local: LocalOptions, engine: str) -> Step:
    """A step of DP-SGD, with every block in the batch."""
    trainer = Trainer(model, VOCAB, local, choose_compute("auto", "fp32"), engine)
    blocks = Blocks(tokens_of(model, local), model.block_size)
    steps = PrivateSteps(blocks, SecureStream(bytes(32), "benchmark"), 1.0, 1.0, 1.0)

    def step() -> None:
        trainer.private.fill(trainer.grad, steps)
        trainer._clip()
        trainer.optimizer.step(1e-3)

    return step


def stock_opacus(model: ModelOptions, local: LocalOptions) -> Step:
    """A step as in Opacus' tutorial."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    gpt = GPT(model, VOCAB).train()
    hooked = GradSampleModule(gpt, batch_first=True, loss_reduction="mean")
    adamw = torch.optim.AdamW(gpt.parameters(), lr=1e-3, fused=True)
    size = local.batch_size
    optimizer = DPOptimizer(
        adamw, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=size
    )
    inputs, targets = Blocks(tokens_of(model, local), model.block_size).take(np.arange(size))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits = hooked(inputs).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, targets.flatten()).backward()
        optimizer.step()

    return step


def tokens_of(model: ModelOptions, local: LocalOptions) -> np.ndarray:
    """The tokens of one batch of blocks."""
    return np.random.default_rng(0).integers(VOCAB, size=local.batch_size * (model.block_size + 1))


def over(own: list[float], reference: list[float]) -> float:
    """The median of the ratios in the same round."""
    return round(statistics.median(a / b for a, b in zip(own, reference, strict=True)), 4)


if __name__ == "__main__":
    main()
