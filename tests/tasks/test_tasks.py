"""Properties of every task: those of the package, and two that a user could have written."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from support.labels_task import DocumentLabel

from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions, RunOptions, TaskOptions, TokenizerOptions
from fedgpt.data.batches import IGNORE
from fedgpt.data.examples import Batch, counted
from fedgpt.data.text import Text
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.tasks.base import TASKS, SampleRequest, Task, make_task

VOCAB, WINDOW = 32, 8


@dataclass(frozen=True)
class SecondHalf(Task):
    """The second half of a document is predicted from the first half."""

    def examples(self, tokens, label, block_size):
        tokens = tokens[: block_size + 1].astype(np.int64)
        targets = tokens[1:].copy()
        targets[: len(targets) // 2] = IGNORE
        yield tokens[:-1], targets


MEMBERS = {
    **{name: make_task(RunOptions(task=TaskOptions(name=name))) for name in TASKS.names()},
    "second half": SecondHalf(),
    "label": DocumentLabel(labels=("a", "b", "c"), length=6),
}
every = pytest.mark.parametrize("task", MEMBERS.values(), ids=MEMBERS)
TOKEN_BYTES = torch.ones(VOCAB, dtype=torch.int64)


def text() -> Text:
    rng = np.random.default_rng(1)
    sizes = [*rng.integers(4, 2 * WINDOW, 20), 1]  # one document is too short for most tasks
    documents = [rng.integers(VOCAB, size=size) for size in sizes]
    return Text.of(documents, [str(label) for label in rng.choice(list("abc"), len(sizes))])


def model(seed: int = 3) -> GPT:
    options = ModelOptions(n_layer=1, n_head=2, n_embd=16, block_size=WINDOW)
    made = GPT(options, VOCAB).eval()
    made.init_weights(seed)
    with torch.no_grad():
        for parameter in made.parameters():  # far from uniform, so that losses of tokens differ
            parameter.mul_(5)
    return made


def held_out(task: Task) -> Batch:
    examples = task.held_out(text(), WINDOW)
    return examples.take(np.arange(len(examples)))


def nats(outputs: torch.Tensor, batch: Batch) -> list[list[float]]:
    """Minus the log probability of each counted target, example by example, in float64."""
    logs = outputs.detach().double().log_softmax(-1)
    return [
        [-float(logs[i, t, int(y)]) for t, y in enumerate(row) if y != IGNORE]
        for i, row in enumerate(batch[1])
    ]


@every
def test_the_loss_of_a_batch_is_the_mean_over_its_counted_targets(task):
    batch = held_out(task)
    outputs = task.forward(model(), batch)
    expected = [each for row in nats(outputs, batch) for each in row]
    assert len(expected) == int(counted(batch)) > 5
    assert task.loss(outputs, batch).item() == pytest.approx(np.mean(expected), rel=1e-5)


@every
def test_the_loss_of_an_example_is_the_mean_over_its_own_targets(task):
    batch = held_out(task)
    outputs = task.forward(model(), batch)
    expected = [np.mean(row) for row in nats(outputs, batch)]
    losses = task.example_losses(outputs, batch)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-4)


@every
def test_the_mean_loss_of_equally_long_examples_is_that_of_their_batch(task):
    batch = held_out(task)
    counts = (batch[1] != IGNORE).sum(1)
    alike = tuple(tensor[counts == counts.mode().values] for tensor in batch)
    assert len(alike[0]) > 2
    outputs = task.forward(model(), alike)
    torch.testing.assert_close(
        task.example_losses(outputs, alike).mean(), task.loss(outputs, alike)
    )


@every
def test_outputs_at_ignored_targets_have_no_effect(task):
    batch = held_out(task)
    ignored = batch[1] == IGNORE
    assert ignored.any()
    outputs = task.forward(model(), batch).detach()
    other = outputs.clone()
    other[ignored] += 100 * torch.rand(int(ignored.sum()), VOCAB)
    assert torch.equal(task.loss(outputs, batch), task.loss(other, batch))
    assert torch.equal(task.example_losses(outputs, batch), task.example_losses(other, batch))
    before, after = (task.tally(each, batch, TOKEN_BYTES) for each in (outputs, other))
    assert before == after


@every
def test_the_loss_of_an_example_depends_only_on_that_example(task):
    """Padding and the rest of the batch have no effect, because DP-SGD clips each example alone."""
    batch = held_out(task)
    net = model()
    together = task.example_losses(task.forward(net, batch), batch)
    for row in range(min(4, len(batch[0]))):
        alone = tuple(tensor[row : row + 1] for tensor in batch)
        own = task.example_losses(task.forward(net, alone), alone)
        torch.testing.assert_close(own[0], together[row])


@every
def test_scores_are_finite_named_and_one_of_them_is_the_score(task):
    batch, net = held_out(task), model()
    half = len(batch[0]) // 2
    totals: dict[str, float] = {}
    for part in (slice(0, half), slice(half, None)):
        rows = tuple(tensor[part] for tensor in batch)
        for name, value in task.tally(task.forward(net, rows), rows, TOKEN_BYTES).items():
            totals[name] = totals.get(name, 0.0) + float(value)
    scores = task.scores(totals)
    assert tuple(scores) == task.scoring.names and task.scoring.score.name in scores
    assert all(math.isfinite(score) for score in scores.values())
    at_once = task.tally(task.forward(net, batch), batch, TOKEN_BYTES)
    assert scores == pytest.approx(
        task.scores({name: float(value) for name, value in at_once.items()}), rel=1e-5
    )


@every
def test_training_batches_follow_from_the_seed_and_have_one_shape(task):
    def drawn(seed: int) -> list[Batch]:
        source = task.batches(text(), WINDOW, 3, seed)
        return [source.next() for _ in range(12)]  # more than an epoch

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(map(torch.equal, sum(first, ()), sum(again, ())))
    assert not all(map(torch.equal, sum(first, ()), sum(other, ())))
    assert {tuple(tensor.shape for tensor in batch) for batch in first} == {
        tuple(tensor.shape for tensor in first[0])
    }
    assert len(first[0][0]) == 3 and all(int(counted(batch)) for batch in first)


@every
@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_private_step_clips_each_units_own_gradient(task, engine):
    units = task.units(text(), WINDOW)
    own = []
    for unit in range(len(units)):
        net = model()
        layout, vector = flatten(net)
        alone = units.take(np.array([unit]))
        parameters = dict(net.named_parameters())
        loss = task.loss(task.forward(net, alone), alone)
        grads = torch.autograd.grad(loss, [parameters[name] for name in layout.names])
        own.append(torch.cat([grad.flatten() for grad in grads]))
    norms = torch.stack(own).norm(dim=1)
    clip = float(norms.median())
    assert norms.max() > 1.01 * clip > 1.02 * norms.min(), "some are clipped and some are not"
    want = ((clip / norms).clamp(max=1)[:, None] * torch.stack(own)).mean(0)
    net = model().train()  # Opacus keeps no activations in evaluation mode
    layout, vector = flatten(net)
    found = torch.zeros_like(vector)
    steps = PrivateSteps(units, SecureStream(bytes(32), "test"), 1.0, 1e-12, clip)
    PrivateGradient(net, layout, task, engine, at_once=4).fill(found, steps)
    assert float((found - want).norm() / want.norm()) < 1e-4


@every
def test_a_sample_follows_from_its_seed_and_continues_its_prompt(task):
    tokenizer = make_tokenizer(TokenizerOptions(name="bytes"), [])
    options = ModelOptions(n_layer=1, n_head=1, n_embd=8, block_size=WINDOW)
    net = GPT(options, tokenizer.vocab_size).eval()

    def written(seed: int, prompt: str | None = "The"):
        return task.sample(net, tokenizer, SampleRequest(text(), prompt, "Once", 20, seed))

    assert written(1) == written(1) != written(2)
    assert written(1).prompt == "The" and written(1, None).prompt == "Once"
    assert 0 < len(written(1).written) <= 20


def test_lm_predicts_every_held_out_token_but_the_first_once():
    targets = MEMBERS["lm"].held_out(text(), WINDOW).rows[1]
    np.testing.assert_array_equal(targets[targets >= 0].numpy(), text().tokens[1:])


def test_a_text_without_an_example_is_refused():
    with pytest.raises(ValueError, match="no example with a counted target"):
        SecondHalf().held_out(Text.of([[1], [2]]), WINDOW)
    with pytest.raises(TypeError, match="abstract class Task"):
        Task()  # pyright: ignore[reportAbstractUsage]


def test_examples_of_lm_are_the_windows_of_one_document():
    tokens = np.arange(2 * WINDOW + 3, dtype=np.uint16)
    pairs = list(MEMBERS["lm"].examples(tokens, "a", WINDOW))
    assert [len(inputs) for inputs, _ in pairs] == [WINDOW, WINDOW, 2]
    assert np.concatenate([targets for _, targets in pairs]).tolist() == tokens[1:].tolist()
    assert all((targets == inputs + 1).all() for inputs, targets in pairs)
