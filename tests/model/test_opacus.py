"""Opacus' hooks give the gradient of each example by itself, for the model of this package."""

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from test_gpt import small, tokens
from torch import Tensor

from fedgpt.model.gpt import GPT, cross_entropy

VARIANTS = {
    "layernorm, tied": {},
    "rmsnorm, tied": {"norm": "rmsnorm"},
    "rmsnorm, rotary, untied, no bias": {
        "norm": "rmsnorm",
        "positions": "rotary",
        "tie": False,
        "bias": False,
    },
}

# a warning of torch about hooks of modules whose inputs need no gradient (token ids), which Opacus
# registers
pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing when gradients are computed:UserWarning"
)


def one_by_one(model: GPT, ids: Tensor, targets: Tensor) -> list[tuple[Tensor, ...]]:
    """Reference: each example alone, by plain autograd."""
    params = list(model.parameters())
    return [
        torch.autograd.grad(model.loss(ids[i : i + 1], targets[i : i + 1]), params)
        for i in range(len(ids))
    ]


@pytest.mark.parametrize(("batch", "time"), [(5, 5), (4, 7), (3, 16)])
@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_hooks_give_each_examples_own_gradient(change, batch, time):
    model = small(**change)
    ids, targets = tokens(batch, time), tokens(batch, time, seed=1)
    reference = one_by_one(model, ids, targets)
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    cross_entropy(hooked(ids), targets).backward()
    for index, p in enumerate(model.parameters()):
        expected = torch.stack([grads[index] for grads in reference])
        torch.testing.assert_close(p.grad_sample, expected, rtol=1e-4, atol=1e-6)


# a warning about speed: attention has no batching rule on CPU and runs example by example
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented:UserWarning"
)
def test_vmap_of_grad_gives_each_examples_own_gradient():
    model = small().double()
    ids, targets = tokens(4, 7), tokens(4, 7, seed=1)
    reference = one_by_one(model, ids, targets)
    params = dict(model.named_parameters())

    def loss(values, row, target):
        logits = torch.func.functional_call(model, values, row[None], tie_weights=True)
        return cross_entropy(logits, target[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, ids, targets)
    for index, name in enumerate(params):
        torch.testing.assert_close(grads[name], torch.stack([g[index] for g in reference]))
