"""Gradients of batches that are computed in parts, against those of whole batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.labels_task import DocumentLabel

from fedgpt.core.device import Compute
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import IGNORE, Batches, Blocks
from fedgpt.data.text import Text
from fedgpt.local.gradient import BatchGradient
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.local.trainer import Trained, Trainer
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.tasks.base import Task
from fedgpt.tasks.lm import LanguageModel

VOCAB, TIME, BATCH = 32, 8, 7
MODEL = ModelOptions(n_layer=1, n_head=2, n_embd=16, block_size=TIME, positions="learned")
TOKENS = np.random.default_rng(0).integers(VOCAB, size=4000)


class Rows:
    """A source of one batch, for ever."""

    def __init__(self, *batch: torch.Tensor):
        self.batch = batch

    def next(self) -> tuple[torch.Tensor, ...]:
        return self.batch


def wide_gradient(batch: tuple[torch.Tensor, ...], task: Task, at_once: int | None):
    """Loss and gradient in float64 of two such batches, computed `at_once` examples at a time."""
    model = GPT(MODEL, VOCAB)
    model.init_weights(3)
    layout, vector = flatten(model.double())
    gradient = BatchGradient(model, task, layout, torch.full_like(vector, 9.0), at_once)
    loss = gradient.fill(Rows(*batch), 2)
    return float(loss), gradient.grad


@settings(max_examples=30, deadline=None)
@given(st.integers(1, BATCH), st.integers(0, 10**6))
def test_parts_give_the_gradient_of_the_whole_batch_whatever_targets_count(at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(VOCAB, (2, BATCH, TIME), generator=generator)
    # some examples have few targets that count, or none, but not all of them
    chance = torch.rand(BATCH, 1, generator=generator).round(decimals=1) * 1.5 - 0.25
    targets[torch.rand(BATCH, TIME, generator=generator) > chance] = IGNORE
    targets[seed % BATCH, -1] = 1
    (loss, grad), (whole_loss, whole) = (
        wide_gradient((inputs, targets), LanguageModel(), size) for size in (at_once, None)
    )
    assert loss == pytest.approx(whole_loss, rel=1e-6)  # a float32
    torch.testing.assert_close(grad, whole, rtol=1e-10, atol=1e-13)


def test_a_batch_without_any_counted_target_has_no_loss_either_way():
    inputs, targets = torch.zeros(2, BATCH, TIME, dtype=torch.int64)
    losses = [
        wide_gradient((inputs, targets + IGNORE), LanguageModel(), size)[0] for size in (3, None)
    ]
    assert np.isnan(losses).all(), "so that the update is rejected"


def job(micro_batch: int, task: Task | None = None, mu: float = 0.0, **model) -> Trained:
    """Six steps of two batches of eight sequences."""
    options = LocalOptions(batch_size=8, accumulate=2, lr=1e-2, min_lr=1e-3, grad_clip=0.5)
    architecture = ModelOptions(**{**vars(MODEL), **model})
    trainer = Trainer(architecture, VOCAB, options, Compute("cpu", "fp32", "test"), task=task)
    trainer.micro_batch = micro_batch
    start = GPT(architecture, VOCAB)
    start.init_weights(1)
    text = Text.of([TOKENS[at : at + 20] for at in range(0, 400, 20)], ["ann", "bob"] * 10)
    source = (
        task.batches(text, TIME, 8, 5) if task is not None else Batches(TOKENS, TIME, 8, seed=5)
    )
    plan = Plan("run", 6, 0, 128, 128 * 12, numbers={"proximal_mu": mu})
    return trainer.train(flatten(start)[1].numpy(), source, plan, None, dropout_seed=7)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize(
    "about", [{}, {"mu": 0.5}, {"task": DocumentLabel()}], ids=["lm", "proximal", "labels"]
)
def test_a_split_job_has_the_update_of_a_whole_one(micro_batch, about):
    split, whole = job(micro_batch, **about), job(8, **about)
    # a bias without an effect on the loss has a gradient of rounding errors alone, which Adam makes
    # as large as the others where the proximal term keeps it away from zero
    felt = np.abs(job(8, **{**about, "mu": 0.0}).delta) > 1e-4
    assert felt.mean() > 0.9
    distance = np.linalg.norm((split.delta - whole.delta)[felt])
    assert distance < 1e-3 * np.linalg.norm(whole.delta)
    assert split.tokens == whole.tokens
    assert split.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-4)
    assert split.metrics["micro_batch"] == micro_batch and "micro_batch" not in whole.metrics


def test_a_split_job_repeats_its_bits_and_draws_dropout_for_each_micro_batch():
    one, again, other = (job(size, dropout=0.3).delta.copy() for size in (4, 4, 2))
    np.testing.assert_array_equal(one, again)
    assert np.linalg.norm(one - other) > 1e-2 * np.linalg.norm(one)


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_private_gradient_does_not_depend_on_the_micro_batch(engine):
    """Clipped by example, and one draw of noise, whatever is computed at the same time."""
    sums = []
    for at_once in (1, 3, 8):
        model = GPT(MODEL, VOCAB)
        model.init_weights(3)
        layout, vector = flatten(model)
        gradient = PrivateGradient(model, layout, LanguageModel(), engine, at_once)
        grad, blocks = torch.zeros_like(vector), Blocks(TOKENS, TIME)
        gradient.rehearse(grad, blocks)  # leaves nothing behind
        stream = SecureStream(bytes(32), "test")  # the same coins and noise
        gradient.fill(grad, PrivateSteps(blocks, stream, 0.05, 1.0, 0.1))
        sums.append(grad)
    for each in sums[1:]:
        torch.testing.assert_close(each, sums[0], rtol=1e-4, atol=1e-6)
