"""A step of DP-SGD: sensitivity, noise, and broken implementations that must fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from support import mechanism as m

from fedgpt.core.device import Compute
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Plan
from fedgpt.core.options import LocalOptions, ModelOptions
from fedgpt.data.batches import Blocks
from fedgpt.local.bookkeeping import BookKeeping
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.local.trainer import Trainer
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.tasks.lm import LanguageModel

VOCAB, TIME, COUNT, CLIP, Q = 32, 8, 24, 0.01, 0.5


MODEL = ModelOptions(n_layer=1, n_head=1, n_embd=16, block_size=TIME, positions="learned")


class Chosen(SecureStream):
    """A stream with known coins: the blocks in `inside` are in the batch."""

    def __init__(self, inside: list[int]):
        super().__init__(bytes(32), "test")
        self.inside = inside

    def uniform(self, count: int) -> np.ndarray:
        return np.where(np.isin(np.arange(count), self.inside), 0.0, 1.0)


class Step:
    """The private gradient of a tiny model on random blocks, multiplied back to the noised sum."""

    def __init__(self):
        torch.manual_seed(0)
        model = GPT(MODEL, VOCAB)
        layout, vector = flatten(model)
        self.gradient = PrivateGradient(model, layout, LanguageModel(), "bookkeeping", 8)
        self.grad = torch.zeros_like(vector)
        tokens = np.random.default_rng(0).integers(VOCAB, size=COUNT * (TIME + 1))
        self.blocks = Blocks(tokens, TIME)

    def sum(
        self, inside: list[int], noise: float = 0.0, stream: SecureStream | None = None
    ) -> np.ndarray:
        steps = PrivateSteps(self.blocks, stream or Chosen(inside), Q, noise, CLIP)
        self.gradient.fill(self.grad, steps)
        return self.grad.double().numpy() * Q * COUNT


def bounded_sensitivity() -> bool:
    """One more block moves the sum by the clip and no further, whatever else is in the batch."""
    step = Step()
    distances = [
        float(np.linalg.norm(step.sum([*others, victim]) - step.sum(others)))
        for others, victim in (([], 0), ([1], 0), ([1, 2], 3), (list(range(1, COUNT)), 0))
    ]
    return max(distances) <= CLIP * (1 + 1e-4) and min(distances) > 0.99 * CLIP


def correct_noise() -> bool:
    """Divided by z * C the noise is standard normal, also of an empty batch and of three parts."""
    step, correct = Step(), []
    for inside in ([], list(range(COUNT))):
        found = (step.sum(inside, noise=2.0) - step.sum(inside)) / (2.0 * CLIP)
        close = abs(found.std() - 1) < 4 / math.sqrt(2 * found.size)
        correct.append(found.any() and close and stats.kstest(found, "norm").pvalue > 1e-4)
    return all(correct)


def independent_noise() -> bool:
    """The noise of two steps of one job is uncorrelated."""
    step, stream = Step(), Chosen([])
    one, two = step.sum([], 1.0, stream), step.sum([], 1.0, stream)
    return bool(one.any() and abs(np.corrcoef(one, two)[0, 1]) < 4 / math.sqrt(one.size))


def divided_by_batch_size():
    correct = PrivateGradient.fill

    def fill(self, grad, steps):
        correct(self, grad, steps)
        grad.mul_(Q * COUNT / max(1, len(steps.stream.inside)))

    return m.patched("fedgpt.local.private.PrivateGradient.fill", fill)


def clipped_as(add):
    return m.patched("fedgpt.local.bookkeeping.BookKeeping.add_clipped", add)


def not_clipped():
    correct = BookKeeping.add_clipped
    return clipped_as(lambda self, losses, clip, total: correct(self, losses, 1e9, total))


def clipped_after_averaging():
    correct = BookKeeping.add_clipped

    def add(self, losses, clip, total):
        found = correct(self, losses, 1e9, total)
        total.mul_((clip / total.norm()).clamp(max=1.0))
        return found

    return clipped_as(add)


def clipped_by_layer():
    @torch.no_grad()
    def add(self, losses, clip, total):
        examples, values = self.gradients(losses)
        for name, gradients in examples.items():
            rows = gradients.flatten(1)
            factors = (clip / rows.norm(dim=1)).clamp(max=1.0)
            self.layout.views(total)[name].view(-1).add_(factors @ rows)
        return values, values

    return clipped_as(add)


def reused_noise():
    correct = SecureStream.add_normal
    return m.patched(
        "fedgpt.privacy.randomness.SecureStream.add_normal",
        lambda self, out, std: correct(SecureStream(bytes(32), "always"), out, std),
    )


CHECKS = (bounded_sensitivity, correct_noise, independent_noise)
BROKEN = {
    "no noise": (m.no_noise, {correct_noise, independent_noise}),
    "a tenth of the noise": (lambda: m.noise_times(0.1), {correct_noise}),
    "divided by the size of the batch": (
        divided_by_batch_size,
        {bounded_sensitivity, correct_noise},
    ),
    "no clipping": (not_clipped, {bounded_sensitivity}),
    "clipped after averaging": (clipped_after_averaging, {bounded_sensitivity}),
    "clipped by layer": (clipped_by_layer, {bounded_sensitivity}),
    "reused noise": (reused_noise, {independent_noise}),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_correct_step_passes_every_check(check):
    assert check()


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_step_fails_its_checks(name):
    broken, expected = BROKEN[name]
    with broken():
        assert {check for check in CHECKS if not check()} >= expected


def test_a_job_of_empty_batches_does_not_depend_on_the_text():
    """Nothing of the text gets past the noise into the update, the moments or the metrics."""
    start, jobs = flatten(GPT(MODEL, VOCAB))[1].numpy(), []
    for seed in (0, 1):
        tokens = np.random.default_rng(seed).integers(VOCAB, size=COUNT * (TIME + 1))
        steps = PrivateSteps(Blocks(tokens, TIME), Chosen([]), Q, 1.0, CLIP)
        options = LocalOptions(steps=3, batch_size=4)
        trainer = Trainer(MODEL, VOCAB, options, Compute("cpu", "fp32", "test"))
        jobs.append(trainer.train(start, steps, Plan("run", 3, 0, 32, 96), None))
    one, two = jobs
    assert one.delta.any() and one.metrics == two.metrics
    for found, other in ((one.delta, two.delta), (one.moments.first, two.moments.first)):
        np.testing.assert_array_equal(found, other)
