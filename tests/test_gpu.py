"""A GPU against a CPU: updates, scores, texts, private gradients; complete and killed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.limited_client import do_job, work_in
from support.world import summary, wait_until

import fedgpt
from fedgpt.core.device import Compute
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import Batches, Blocks
from fedgpt.data.text import Text
from fedgpt.evaluate.held_out import HeldOut
from fedgpt.local.gradient import BatchGradient
from fedgpt.local.private import PrivateSteps
from fedgpt.local.trainer import Trainer
from fedgpt.model.generate import generate
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.storage.run_folder import read_lines
from fedgpt.tasks.lm import LanguageModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODEL = ModelOptions(n_layer=2, n_head=2, n_embd=64, block_size=32, positions="rotary")
VOCAB = 257
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 20_000)
LOCAL = LocalOptions(batch_size=4, lr=1e-3, min_lr=1e-4)
PLAN = Plan("run", 10, 0, 128, 128 * 20)
GPU_SHARE = 1 << 30  # bytes beside the model; a batch of 64 x 512 tokens needs more
RUN = [
    "corpus=stdlib",
    "tokenizer=bytes",
    "model.n_layer=2",
    "model.n_embd=64",
    "rounds=3",
    "pace.clients=4",
    "local.steps=5",
    "runtime.device=cuda",
    "evaluate.tokens=4096",
]


def start() -> np.ndarray:
    model = GPT(MODEL, VOCAB)
    model.init_weights(1)
    return flatten(model)[1].numpy()


def trained(
    device: str, dtype: str = "fp32", moments=None, plan: Plan = PLAN, **local
) -> tuple[np.ndarray, float]:
    options = LocalOptions(**{**vars(LOCAL), **local})
    trainer = Trainer(MODEL, VOCAB, options, Compute(device, dtype, "test"))
    done = trainer.train(
        start(), Batches(TOKENS, MODEL.block_size, options.batch_size, 3), plan, moments, 7
    )
    return done.delta.copy(), done.metrics["train_loss"]


def relative_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("local", [{}, {"accumulate": 2}, {"grad_clip": 0.0}], ids=str)
def test_an_update_agrees_with_that_of_a_cpu(local):
    (delta, loss), (cpu_delta, cpu_loss) = trained("cuda", **local), trained("cpu", **local)
    assert loss == pytest.approx(cpu_loss, rel=1e-5)
    assert relative_distance(delta, cpu_delta) < 1e-3, (
        "Adam turns rounded tiny gradients into full steps"
    )


def test_training_in_bf16_reaches_the_loss_of_fp32():
    plan = Plan("run", 60, 0, 128, 128 * 60)
    (delta, loss), (_, cpu_loss) = trained("cuda", "bf16", plan=plan), trained("cpu", plan=plan)
    assert np.isfinite(delta).all() and loss == pytest.approx(cpu_loss, rel=2e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_repeated_job_has_the_same_bits(dtype):
    model = ModelOptions(n_layer=2, n_head=2, n_embd=128, block_size=256, positions="learned")
    local = LocalOptions(**{**vars(LOCAL), "batch_size": 16})
    trainer = Trainer(model, VOCAB, local, Compute("cuda", dtype, "test"))
    vector = np.random.default_rng(2).normal(0, 0.02, trainer.layout.size).astype(np.float32)
    deltas = [
        trainer.train(vector, Batches(TOKENS, 256, 16, 3), PLAN, None, 7).delta.copy()
        for _ in range(3)
    ]
    assert all((delta == deltas[0]).all() for delta in deltas)


def test_dropout_follows_from_its_seed():
    model = ModelOptions(**{**vars(MODEL), "dropout": 0.2})
    trainer = Trainer(model, VOCAB, LOCAL, Compute("cuda", "bf16", "test"))
    first, again, other = (
        trainer.train(start(), Batches(TOKENS, 32, 4, 3), PLAN, None, seed).delta.copy()
        for seed in (7, 7, 8)
    )
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_recorded_gradient_has_the_bits_of_one_that_is_launched_kernel_by_kernel(dtype):
    trainer = Trainer(MODEL, VOCAB, LOCAL, Compute("cuda", dtype, "test"))
    trainer._receive(start())
    plain = BatchGradient(trainer.model, trainer.task, trainer.layout, trainer.grad)
    batches = Batches(TOKENS, MODEL.block_size, LOCAL.batch_size, 3)
    for _ in range(3):
        batch = batches.next()
        loss, grads = plain(batch)
        again, recorded = trainer.gradient(batch)
        assert again == loss and all(map(torch.equal, recorded, grads))
    with pytest.raises(ValueError, match=r"recorded for batches of .*4, 32.*, this one is .*1, 32"):
        trainer.gradient(tuple(tensor[:1] for tensor in batch))


@pytest.mark.parametrize("size", [64, 67], ids=["graph", "parts of two shapes"])
def test_a_job_beyond_a_share_of_the_memory_is_split(tmp_path, size):
    model = ["model.n_embd=256", "model.n_layer=4", "model.block_size=512"]
    options = [*model, "runtime.device=cuda", f"local.batch_size={size}"]
    whole_header, whole = do_job(work_in(tmp_path / "whole", "none", *options))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    work = work_in(tmp_path, "none", *options)
    assert work.trainer
    share = (torch.cuda.memory_reserved() + GPU_SHARE) / total
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        header, delta = do_job(work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "micro_batch" not in whole_header["metrics"]
    assert 1 <= header["metrics"]["micro_batch"] < size
    assert relative_distance(delta, whole) < 1e-3
    same = work_in(tmp_path / "same", "none", *options)
    same._fitting.micro_batch = int(header["metrics"]["micro_batch"])
    assert (do_job(same)[1] == delta).all(), "the same bits with the same micro-batches"


def test_jobs_free_their_memory():
    trainer = Trainer(MODEL, VOCAB, LOCAL, Compute("cuda", "bf16", "test"))

    def held() -> int:
        trainer.train(start(), Batches(TOKENS, MODEL.block_size, LOCAL.batch_size, 3), PLAN, None)
        return torch.cuda.memory_allocated()

    held()
    assert len({held() for _ in range(4)}) == 1


def test_scores_and_texts_agree_with_those_of_a_cpu():
    lengths = np.ones(VOCAB, np.int64)
    task = LanguageModel()
    examples = task.held_out(Text.of([TOKENS[:18_000]]), MODEL.block_size)
    on_gpu, on_cpu = (
        HeldOut(MODEL, examples, lengths, Compute(d, "fp32", "test"), task) for d in ("cuda", "cpu")
    )
    rows = on_gpu._batch_size
    assert len(examples) > 2 * rows and len(examples) % rows, "several batches, one ragged"
    vector = 5 * start()
    assert on_gpu(vector)["loss"] == pytest.approx(on_cpu(vector)["loss"], rel=1e-5)
    texts = [
        generate(side.model, [1, 2, 3], 20, samples=2, top_k=20, seed=4)
        for side in (on_gpu, on_cpu)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_private_gradient_agrees_with_that_of_a_cpu(engine):
    gradients = []
    for device in ("cuda", "cpu"):
        trainer = Trainer(MODEL, VOCAB, LOCAL, Compute(device, "fp32", "test"), engine)
        trainer._receive(5 * start())
        stream = SecureStream(bytes(32), "test")  # the same coins and noise for both
        trainer.private.fill(
            trainer.grad, PrivateSteps(Blocks(TOKENS[:3300], 32), stream, 0.2, 0.5, 0.1)
        )
        gradients.append(trainer.grad.cpu().numpy().copy())
    assert relative_distance(*gradients) < 1e-4


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["strategy=fltrust"],
        ["update=int8"],
        ["pace=buffer", "clock=virtual", "fleet=published"],
        ["privacy=example", "privacy.target_epsilon=50", "local=reset"],
        ["privacy=client", "privacy.target_epsilon=50"],
        ["pace=buffer", "clock=real"],
        ["runtime.workers=2"],
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_a_run_reaches_its_end(tmp_path, more):
    run = fedgpt.run(*RUN, *more, f"run_dir={tmp_path / 'run'}")
    found = run.summary
    assert np.isfinite(found["final"]["loss"]) and not found["rejected"]
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["device"] == "cuda" and environment["gpu"] == torch.cuda.get_device_name()
    if not any(option.startswith("privacy") for option in more):
        assert found["final"]["loss"] < found["initial"]["loss"]


def test_a_run_has_the_same_bits_on_one_worker_and_on_two(tmp_path):
    runs = [
        fedgpt.run(
            *RUN, f"runtime.workers={n}", "runtime.threads=1", f"run_dir={tmp_path / str(n)}"
        )
        for n in (1, 2)
    ]
    assert len({run.summary["weights_sha256"] for run in runs}) == 1


def test_a_run_killed_and_resumed_ends_in_the_same_bits(tmp_path):
    options = [*RUN, "rounds=6", "checkpoint.every=2"]
    uninterrupted = fedgpt.run(*options, f"run_dir={tmp_path / 'uninterrupted'}")
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedgpt", "run", *options, f"run_dir={folder}"]
    )

    def versions() -> int:
        events = folder / "events.jsonl"
        return sum(e["event"] == "version" for e in read_lines(events)) if events.exists() else 0

    wait_until(lambda: versions() >= 3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        [sys.executable, "-m", "fedgpt", "run", f"resume={folder}"], check=True, timeout=180
    )
    assert summary(folder)["weights_sha256"] == uninterrupted.summary["weights_sha256"]
