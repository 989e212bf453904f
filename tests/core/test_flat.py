"""The parameters of a model as views of one vector: no copy, none missing, none twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedgpt.core.flat import FlatParams, flatten
from fedgpt.core.options import ModelOptions
from fedgpt.model.gpt import GPT


class Small(nn.Module):
    """Has what a layout must handle: a vector before a matrix, a tied head and a buffer."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, width + 1))
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=True)
        self.head.weight = self.embed.weight
        self.register_buffer("counter", torch.zeros(7))

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


def test_the_layout_has_matrices_first_tied_weights_once_and_no_buffers():
    layout = FlatParams.of(Small())
    assert layout.names == ("embed.weight", "scale", "head.bias")
    assert layout.shapes == ((5, 3), (3,), (5,))
    assert layout.sizes == (15, 3, 5) and layout.size == 23
    assert layout.decayed == 15


def test_the_layout_of_a_gpt_has_all_of_its_parameters():
    model = GPT(ModelOptions(n_layer=2, n_head=2, n_embd=8, block_size=4, positions="learned"), 11)
    layout = FlatParams.of(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(zip(layout.names, layout.shapes, strict=True)) == shapes
    assert layout.size == sum(p.numel() for p in model.parameters())
    assert layout.decayed == sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    dims = [len(shape) >= 2 for shape in layout.shapes]
    assert dims == sorted(dims, reverse=True), "the parameters with weight decay are one range"


def test_flattening_keeps_the_values_in_the_order_of_the_layout():
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layout, vector = flatten(model)
    assert vector.shape == (23,) and vector.is_contiguous() and vector.dtype == torch.float32
    assert torch.equal(vector, torch.cat([before[name].flatten() for name in layout.names]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_parameters_and_vector_share_their_memory():
    model = Small()
    layout, vector = flatten(model)
    start = 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        assert dict(model.named_parameters())[name].data_ptr() == vector[start:].data_ptr()
        start += size
    assert model.head.weight is model.embed.weight
    vector.zero_()
    assert not any(p.any() for p in model.parameters())
    with torch.no_grad():
        model.head.weight[2, 1] = 7.0
    assert vector[2 * 3 + 1] == 7.0


def test_writing_the_vector_changes_what_the_module_computes():
    model = Small(width=1)
    _, vector = flatten(model)
    np.copyto(vector.numpy(), np.array([1, 2, 3, 4, 5, 10, 0, 0, 0, 0, 100], np.float32))
    # the embedding of token 1 is 2, times the scale 10, times each row of the tied head, plus the
    # last bias
    assert model(torch.tensor([1])).tolist() == [[20.0, 40.0, 60.0, 80.0, 200.0]]


def test_gradients_and_optimisers_work_on_the_views():
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    layout, vector = flatten(model)
    for each in (model, plain):
        optimiser = torch.optim.SGD(each.parameters(), lr=0.1)
        each(torch.tensor([0, 3])).square().sum().backward()
        optimiser.step()
    expected = torch.cat(
        [dict(plain.named_parameters())[name].detach().flatten() for name in layout.names]
    )
    assert torch.equal(vector, expected)


def test_views_share_storage_with_any_vector_of_the_right_length():
    layout = FlatParams.of(Small())
    vector = torch.arange(23, dtype=torch.float64)
    views = layout.views(vector)
    assert [tuple(v.shape) for v in views.values()] == list(layout.shapes)
    assert views["scale"].tolist() == [15.0, 16.0, 17.0]
    views["head.bias"].fill_(-1)
    assert vector[-5:].tolist() == [-1] * 5


@pytest.mark.parametrize("length", [0, 22, 24])
def test_a_vector_of_another_length_is_refused(length):
    with pytest.raises(
        ValueError, match=f"a vector of {length} elements does not fit a layout of 23"
    ):
        FlatParams.of(Small()).views(torch.zeros(length))


def test_the_dtype_of_the_parameters_is_kept():
    layout, vector = flatten(Small().double())
    assert vector.dtype == torch.float64 and layout == FlatParams.of(Small())


def test_the_digest_depends_on_the_layout_only():
    layout = FlatParams.of(Small())
    assert layout.digest == FlatParams.of(Small()).digest, "values do not matter"
    assert len(layout.digest) == 16 and int(layout.digest, 16) >= 0
    renamed = FlatParams(("other", *layout.names[1:]), layout.shapes, layout.decayed)
    reshaped = FlatParams(layout.names, ((3, 5), *layout.shapes[1:]), layout.decayed)
    assert (
        len({layout.digest, renamed.digest, reshaped.digest, FlatParams.of(Small(4)).digest}) == 4
    )
