"""Both engines of per-example gradients against torch.func and each other; refused models."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedgpt.core.flat import FlatParams, flatten
from fedgpt.core.options import ModelOptions
from fedgpt.data.batches import Blocks
from fedgpt.local.bookkeeping import BookKeeping, Unsupported
from fedgpt.local.opacus_hooks import OpacusHooks
from fedgpt.local.private import PrivateGradient, PrivateSteps
from fedgpt.model.gpt import GPT
from fedgpt.privacy.randomness import SecureStream
from fedgpt.tasks.lm import LanguageModel

VOCAB, TIME, BATCH = 64, 16, 7
VARIANTS = {
    "default": {},
    "untied": {"tie": False},
    "rmsnorm": {"norm": "rmsnorm"},
    "no bias": {"bias": False},
    "rotary": {"positions": "rotary"},
    "rmsnorm untied rotary": {"norm": "rmsnorm", "tie": False, "positions": "rotary"},
    "pythia": {"positions": "rotary", "parallel_residual": True, "partial_rotary_factor": 0.25},
    "llama": {
        **{"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
        **{"n_kv_head": 1, "n_inner": 24, "qkv_bias": True},
    },
}
# torch.func warns about speed, the hooks warn about embeddings
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def make(shift: float = 0.05, **options) -> tuple[GPT, FlatParams, torch.Tensor]:
    torch.manual_seed(0)
    shape = ModelOptions(n_layer=2, n_head=2, n_embd=32, block_size=TIME, positions="learned")
    model = GPT(replace(shape, **options), VOCAB)
    layout, vector = flatten(model)
    with torch.no_grad():
        vector.add_(shift * torch.randn_like(vector))
    return model, layout, vector


def batch(size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (size, TIME + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


TASK = LanguageModel()


def example_losses(model: GPT, *batch: torch.Tensor) -> torch.Tensor:
    return TASK.example_losses(TASK.forward(model, batch), batch)


def reference(
    model: GPT, layout: FlatParams, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """(batch, parameters): every example's own gradient, by torch.func."""

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x[None],), tie_weights=True)[0], y)

    params = {name: p.detach() for name, p in model.named_parameters()}
    own = vmap(grad(loss), in_dims=(None, 0, 0))(params, inputs, targets)
    return torch.cat([own[name].flatten(1) for name in layout.names], 1)


def clipped_sum(own: torch.Tensor, clip: float) -> torch.Tensor:
    return ((clip / own.norm(dim=1)).clamp(max=1)[:, None] * own).sum(0)


@pytest.mark.parametrize("engine", [BookKeeping, OpacusHooks])
@pytest.mark.parametrize("name", VARIANTS)
def test_norms_and_clipped_sums_are_those_of_per_example_gradients(name, engine):
    model, layout, vector = make(**VARIANTS[name])
    inputs, targets = batch()
    own = reference(model, layout, inputs, targets)
    clip = float(own.norm(dim=1).median())
    made = engine(model, layout)
    for _ in range(2):  # the second call must not contain results of the first
        total = torch.zeros_like(vector)
        norms, losses = made.add_clipped(
            lambda: example_losses(model, inputs, targets), clip, total
        )
    torch.testing.assert_close(norms, own.norm(dim=1), rtol=1e-5, atol=0)
    assert float((total - clipped_sum(own, clip)).norm() / clipped_sum(own, clip).norm()) < 1e-5
    torch.testing.assert_close(losses.mean(), model.loss(inputs, targets).detach())


def test_the_sum_of_unclipped_gradients_is_the_gradient_of_the_batch():
    model, layout, vector = make()
    inputs, targets = batch()
    total = torch.zeros_like(vector)
    BookKeeping(model, layout).add_clipped(
        lambda: example_losses(model, inputs, targets), 1e9, total
    )
    loss = model.loss(inputs, targets)
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [parameters[name] for name in layout.names])
    want = torch.cat([grad.flatten() for grad in grads])
    torch.testing.assert_close(total / BATCH, want, rtol=1e-4, atol=1e-7)


def test_batches_of_any_size_share_the_buffers():
    model, layout, vector = make()
    engine = BookKeeping(model, layout)
    for size in (7, 3, 9, 1):
        inputs, targets = batch(size)
        total = torch.zeros_like(vector)
        engine.add_clipped(lambda x=inputs, y=targets: example_losses(model, x, y), 0.5, total)
        want = clipped_sum(reference(model, layout, inputs, targets), 0.5)
        assert float((total - want).norm() / want.norm()) < 1e-5, size


def test_gradients_with_dropout_equal_those_of_autograd():
    model, layout, vector = make(dropout=0.3)
    model.train()
    inputs, targets = batch()
    torch.manual_seed(5)
    total = torch.zeros_like(vector)
    BookKeeping(model, layout).add_clipped(
        lambda: example_losses(model, inputs, targets), 1e9, total
    )
    torch.manual_seed(5)
    loss = example_losses(model, inputs, targets).sum()
    parameters = dict(model.named_parameters())
    want = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, [parameters[n] for n in layout.names])]
    )
    torch.testing.assert_close(total, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", [BookKeeping, OpacusHooks])
def test_an_example_without_a_finite_gradient_adds_nothing(engine):
    model, layout, vector = make(
        tie=False
    )  # if tied, the broken row would reach the head of every example
    inputs, targets = batch()
    with torch.no_grad():
        model.transformer["wte"].weight[VOCAB - 1] = float("nan")
    inputs, targets = inputs.clamp(max=VOCAB - 2), targets.clamp(max=VOCAB - 2)
    inputs[2, 3] = VOCAB - 1
    total = torch.zeros_like(vector)
    norms, _ = engine(model, layout).add_clipped(
        lambda: example_losses(model, inputs, targets), 0.5, total
    )
    others = torch.arange(BATCH) != 2
    assert not norms[2].isfinite() and norms[others].isfinite().all()
    assert total.isfinite().all()
    want = torch.zeros_like(vector)
    BookKeeping(model, layout).add_clipped(
        lambda: example_losses(model, inputs[others], targets[others]), 0.5, want
    )
    torch.testing.assert_close(total, want)


def test_frozen_parameters_are_left_out_of_norms_and_sums():
    model, layout, vector = make()
    inputs, targets = batch()
    own = reference(model, layout, inputs, targets)
    model.transformer["h"][0].attn.c_attn.bias.requires_grad_(False)
    model.transformer["h"][1].ln_1.weight.requires_grad_(False)
    keep = torch.ones(layout.size, dtype=torch.bool)
    for name, part in zip(layout.names, keep.split(list(layout.sizes)), strict=True):
        part.fill_(name not in ("transformer.h.0.attn.c_attn.bias", "transformer.h.1.ln_1.weight"))
    total = torch.zeros_like(vector)
    norms, _ = BookKeeping(model, layout).add_clipped(
        lambda: example_losses(model, inputs, targets), 0.5, total
    )
    torch.testing.assert_close(norms, own[:, keep].norm(dim=1), rtol=1e-5, atol=0)
    assert not total[~keep].any()


class Odd(nn.Module):
    """A small model around one layer, which is the subject of a test."""

    def __init__(self, layer: nn.Module | None = None, shared_positions: bool = False):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, 8)
        self.wpe = nn.Embedding(TIME, 8)
        self.layer = layer or nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCAB)
        self.shared_positions = shared_positions

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.size(1))
        x = self.wte(ids) + self.wpe(
            positions if self.shared_positions else positions.repeat(len(ids), 1)
        )
        return self.head(self.layer(x))


class Bare(Odd):
    """A model with a parameter on its root module."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))


class Fancy(nn.Linear):
    """A subclass, which may compute anything."""


@pytest.mark.parametrize(
    "module",
    [
        Odd(nn.Conv1d(TIME, TIME, 1)),
        Odd(nn.Bilinear(8, 8, 8)),
        Odd(Fancy(8, 8)),
        Odd(nn.BatchNorm1d(TIME)),
        Bare(),
        Odd(nn.Embedding(4, 8, padding_idx=0)),
        Odd(nn.Embedding(4, 8, max_norm=1.0)),
        Odd(nn.Embedding(4, 8, scale_grad_by_freq=True)),
        Odd(nn.Embedding(4, 8, sparse=True)),
        Odd(nn.LayerNorm((TIME, 8))),
        Odd(nn.RMSNorm((TIME, 8))),
    ],
    ids=lambda m: type(m).__name__ if type(m) is not Odd else repr(m.layer),
)
def test_a_layer_without_a_per_example_rule_is_refused(module):
    with pytest.raises(Unsupported, match="no per-example rule"):
        BookKeeping(module, FlatParams.of(module))


# TIME: with as many examples as positions the shape alone does not show the sharing
@pytest.mark.parametrize("size", [3, TIME])
def test_positions_that_all_examples_share_are_refused(size):
    model = Odd(shared_positions=True)
    layout, vector = flatten(model)
    ids = torch.zeros(size, TIME, dtype=torch.long)
    with pytest.raises(
        Unsupported,
        match=rf"Embedding got \({TIME},\): not \(batch, time, ...\) of {size} examples",
    ):
        BookKeeping(model, layout).add_clipped(
            lambda: model(ids).sum((1, 2)), 1.0, torch.zeros_like(vector)
        )
    # the hooks have been removed
    assert not any(m._forward_hooks for m in model.modules())


# ---- a step of DP-SGD


def steps_of(
    count: int = 40, probability: float = 0.25, noise: float = 1.0, key: int = 0
) -> PrivateSteps:
    tokens = np.random.default_rng(3).integers(VOCAB, size=count * (TIME + 1))
    stream = SecureStream(bytes([key] * 32), "test")
    return PrivateSteps(Blocks(tokens, TIME), stream, probability, noise, 0.5)


@pytest.mark.parametrize(
    ("engine", "kind"), [("bookkeeping", BookKeeping), ("opacus", OpacusHooks)]
)
def test_a_step_is_the_clipped_sum_and_noise_over_a_constant(engine, kind):
    model, layout, vector = make()
    steps = steps_of(noise=1e-12)
    chosen = np.flatnonzero(SecureStream(bytes(32), "test").uniform(40) < 0.25)
    assert 2 < len(chosen) < 20 and len(chosen) != 10
    found = torch.zeros_like(vector)
    # a batch size of 3 makes several parts
    gradient = PrivateGradient(model, layout, TASK, engine, at_once=3)
    assert type(gradient.engine) is kind
    gradient.fill(found, steps)
    # of a new model, because torch.func does not work with the hooks of Opacus
    own = reference(make()[0], layout, *steps.units.take(chosen))
    want = clipped_sum(own, 0.5) / 10  # q * n, not the number of examples drawn
    assert float((found - want).norm() / want.norm()) < 1e-5


def test_an_empty_batch_still_gives_noise():
    model, layout, vector = make()
    found = torch.zeros_like(vector)
    PrivateGradient(model, layout, TASK, "bookkeeping", 8).fill(
        found, steps_of(probability=1e-9, noise=2.0)
    )
    std = 2.0 * 0.5 / (1e-9 * 40)
    assert abs(float(found.std()) / std - 1) < 4 / (2 * layout.size) ** 0.5


def test_examples_are_drawn_independently_with_the_given_probability():
    model, layout, vector = make()
    gradient = PrivateGradient(model, layout, TASK, "bookkeeping", 8)
    sizes: list[int] = []
    steps = steps_of(count=100, probability=0.2)
    gradient.engine = Counting(sizes)
    for _ in range(200):
        sizes.append(0)
        gradient.fill(torch.zeros_like(vector), steps)
    assert abs(np.mean(sizes) - 20) < 4 * 4 / np.sqrt(200)
    assert 0.7 < np.var(sizes) / 16 < 1.4, "the variance of a binomial distribution"


class Counting:
    """An engine that counts examples instead of computing gradients."""

    def __init__(self, sizes: list[int]):
        self.sizes = sizes

    def add_clipped(self, losses, clip, total):
        self.sizes[-1] += len(losses())
        return torch.zeros(0), torch.zeros(0)


def test_blocks_do_not_overlap_and_begin_with_the_first_token():
    tokens = np.arange(103)
    blocks = Blocks(tokens, 9)
    assert len(blocks) == 10
    inputs, targets = blocks.take(np.array([0, 3]))
    np.testing.assert_array_equal(inputs[0], range(9))
    np.testing.assert_array_equal(targets[1], range(31, 40))
    with pytest.raises(ValueError, match="5 tokens do not fill a block of block_size=9"):
        Blocks(np.arange(5), 9)


def test_opacus_leaves_no_gradients_on_the_parameters():
    model, layout, vector = make()
    inputs, targets = batch()
    engine = OpacusHooks(model, layout)
    engine.add_clipped(
        lambda: example_losses(model, inputs, targets), 0.5, torch.zeros_like(vector)
    )
    torch.autograd.grad(model.loss(inputs, targets), list(model.parameters()))
    assert all(
        p.grad is None and getattr(p, "grad_sample", None) is None for p in model.parameters()
    )
