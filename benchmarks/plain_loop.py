"""Federated averaging written without a framework: the reference of benchmarks/overhead.py.

    python benchmarks/plain_loop.py FOLDER [key=value ...]      # the options of `fedgpt run`

The processes are spawned once, with one pipe each; all vectors are in shared memory. Nothing of
fedgpt's server or of Flower is used: there are no messages, digests, validation, exact sums, files,
metrics or resuming. A client does the same work as in fedgpt, with the same Trainer, shards,
batches, seeds and learning rates, so that the final weights are (nearly) the same. In each round
the parent gives the next client to a process that is idle, and adds a finished update in place, in
float32. The Adam moments of the clients are kept in shared memory, one row for each client, because
another process may train the client in the next round.

The program writes events.jsonl to FOLDER, one line with the seconds so far after each server step,
and params.npz with the `first` and `last` weights.
"""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from fedgpt.config import compose
from fedgpt.core.device import choose_compute, cores
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed, numpy_generator
from fedgpt.data.batches import Batches
from fedgpt.data.shards import load_shards
from fedgpt.flower.launch import KEEP_HEAP  # environment variables that both sides set
from fedgpt.local.optimizer import Moments
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT


class SharedArray:
    """A float32 array in anonymous shared memory, passed to processes as a descriptor.

    It does not use /dev/shm, which may be small.
    """

    def __init__(self, *shape: int):
        self.shape, self._descriptor = shape, os.memfd_create("plain_loop")
        os.ftruncate(self._descriptor, 4 * int(np.prod(shape)))
        self._map()

    def _map(self) -> None:
        self.tensor = torch.frombuffer(mmap.mmap(self._descriptor, 0), dtype=torch.float32).view(
            self.shape
        )

    def __getstate__(self) -> tuple[tuple[int, ...], Any]:
        return self.shape, DupFd(self._descriptor)

    def __setstate__(self, state: tuple[tuple[int, ...], Any]) -> None:
        self.shape, self._descriptor = state[0], state[1].detach()
        self._map()


@dataclass(frozen=True)
class Job:
    """A message to a process; the reply is the slot and the number of trained tokens."""

    slot: int  # row of Memory.updates for the update
    client: int
    number: int  # number of earlier jobs of the client
    plan: Plan


@dataclass(frozen=True)
class Memory:
    """All vectors; every process shares them."""

    params: SharedArray  # (parameters,)
    updates: SharedArray  # (clients of a round, parameters)
    moments: SharedArray  # (clients, 2, parameters)


def work(pipe: Connection, memory: Memory, options: RunOptions, threads: int) -> None:
    """The loop of a process: train one job after the other, until None arrives."""
    torch.set_num_threads(threads)
    prepared, shards = load_shards(options)
    compute = choose_compute(options.runtime.device, options.local.precision)
    trainer = Trainer(options.model, prepared.tokenizer.vocab_size, options.local, compute)
    params, updates, kept = (
        array.tensor for array in (memory.params, memory.updates, memory.moments)
    )
    while (job := pipe.recv()) is not None:
        shard, done = shards[job.client], job.number * options.local.steps
        seeds = [
            derive_seed(options.seed, purpose, shard.client, job.number)
            for purpose in ("batches", "dropout")
        ]
        tokens = shard.read(prepared.tokens)
        batches = Batches(tokens, options.model.block_size, options.local.batch_size, seeds[0])
        moments = Moments(kept[job.client, 0], kept[job.client, 1], done) if done else None
        trained = trainer.train(params.numpy(), batches, job.plan, moments, seeds[1])
        kept[job.client, 0].copy_(trained.moments.first)
        kept[job.client, 1].copy_(trained.moments.second)
        updates[job.slot].copy_(torch.from_numpy(trained.delta))
        pipe.send((job.slot, trained.tokens))


class Parent:
    """The server: it hands out jobs, adds updates and takes a step."""

    def __init__(self, options: RunOptions):
        self.options = options
        prepared, shards = load_shards(options)
        self.numbers = [0] * len(shards)
        self.cohort = min(options.pace.clients or len(shards), len(shards))
        model = GPT(options.model, prepared.tokenizer.vocab_size)
        model.init_weights(derive_seed(options.seed, "init"))
        self.first = flatten(model)[1]
        size = self.first.numel()
        self.memory = Memory(
            SharedArray(size), SharedArray(self.cohort, size), SharedArray(len(shards), 2, size)
        )
        self.memory.params.tensor.copy_(self.first)
        self.total = torch.zeros(size)
        local = options.local
        self.step_tokens = (
            local.accumulate * local.batch_size * options.model.block_size * self.cohort
        )
        self.tokens_total = options.rounds * local.steps * self.step_tokens

    def run(self, stamps: TextIO) -> None:
        """Start the processes, run all rounds, end the processes."""
        pipes, processes = self.start()
        began = time.monotonic()
        for version in range(self.options.rounds):
            self.round(version, pipes)
            seconds = time.monotonic() - began
            about = {"event": "version", "version": version + 1, "wall_seconds": seconds}
            print(json.dumps(about), file=stamps, flush=True)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()

    def start(self) -> tuple[list[Connection], list[SpawnProcess]]:
        """As many processes as fedgpt's pool starts, in the same environment."""
        workers = self.options.runtime.workers or cores()
        threads = self.options.runtime.threads or 1
        torch.set_num_threads(threads)
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        os.environ.update({**KEEP_HEAP, **dict.fromkeys(pools, str(threads))})
        spawn = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for _ in range(workers):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(
                target=work, args=(theirs, self.memory, self.options, threads), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        return pipes, processes

    def round(self, version: int, pipes: list[Connection]) -> None:
        """One round: subtract the mean of the updates, weighted by tokens, from the parameters."""
        # the same clients as in a round of fedgpt
        draw = numpy_generator(self.options.seed, "cohort", version)
        chosen = sorted(int(i) for i in draw.choice(len(self.numbers), self.cohort, replace=False))
        jobs = deque(self.job(slot, client, version) for slot, client in enumerate(chosen))
        busy = pipes[: len(jobs)]
        for pipe in busy:
            pipe.send(jobs.popleft())
        weight = 0
        self.total.zero_()
        for pipe in self.replies(busy):
            slot, tokens = pipe.recv()
            if jobs:
                pipe.send(jobs.popleft())
                busy.append(pipe)
            self.total.add_(self.memory.updates.tensor[slot], alpha=tokens)
            weight += tokens
        self.memory.params.tensor.sub_(self.total, alpha=1 / weight)

    def replies(self, busy: list[Connection]) -> Iterator[Connection]:
        """The pipes with a reply, as they arrive; `busy` may grow while one is handled."""
        while busy:
            for pipe in wait(busy):
                assert isinstance(pipe, Connection)
                busy.remove(pipe)
                yield pipe

    def job(self, slot: int, client: int, version: int) -> Job:
        steps, number = self.options.local.steps, self.numbers[client]
        self.numbers[client] += 1
        done = version * steps * self.step_tokens
        plan = Plan("plain", steps, done, self.step_tokens, self.tokens_total)
        return Job(slot, client, number, plan)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    parent = Parent(compose.load(sys.argv[2:]))
    with (folder / "events.jsonl").open("w") as stamps:
        parent.run(stamps)
    np.savez(
        folder / "params.npz", first=parent.first.numpy(), last=parent.memory.params.tensor.numpy()
    )


if __name__ == "__main__":
    main()
