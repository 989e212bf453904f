"""A partly frozen model: its trained parameters, its vector and its base weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedgpt.core.flat import FlatParams, base_digest, flatten, frozen_weights
from fedgpt.core.options import ModelOptions
from fedgpt.model.build import build_model, freeze
from fedgpt.model.gpt import GPT

VOCAB = 23
OPTIONS = ModelOptions(n_layer=2, n_head=2, n_embd=16, block_size=8)
LAST = ["transformer.h.1.*", "transformer.ln_f.*"]


def base_of(options: ModelOptions, seed: int = 5) -> dict[str, torch.Tensor]:
    model = GPT(options, VOCAB)
    model.init_weights(seed)
    freeze(model, options.trainable)
    return frozen_weights(model)


def trained(model: GPT) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_without_patterns_everything_is_trained_and_the_base_is_empty():
    model = build_model(OPTIONS, VOCAB)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert frozen_weights(model) == {} and base_digest({}) == ""
    plain = GPT(OPTIONS, VOCAB)
    assert FlatParams.of(model) == FlatParams.of(plain)
    assert torch.equal(flatten(model)[1], flatten(plain)[1])


def test_patterns_select_and_the_base_fills_the_rest():
    options = replace(OPTIONS, trainable=LAST)
    base = base_of(options)
    model = build_model(options, VOCAB, base)
    names = {name for name, _ in model.named_parameters()}
    chosen = {name for name in names if name.startswith(("transformer.h.1.", "transformer.ln_f."))}
    assert trained(model) == chosen == names - base.keys()
    assert base_digest(frozen_weights(model)) == base_digest(base)
    assert not torch.equal(base["transformer.wte.weight"], GPT(OPTIONS, VOCAB).lm_head.weight)


@pytest.mark.parametrize("pattern", ["lm_head.*", "transformer.wte.weight"])
def test_a_tied_weight_is_trained_if_either_of_its_names_is_selected(pattern):
    options = replace(OPTIONS, trainable=[pattern])
    model = build_model(options, VOCAB, base_of(options))
    assert trained(model) == {"transformer.wte.weight"}
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert flatten(model)[0].size == VOCAB * 16


def test_an_untied_head_is_trained_alone():
    options = replace(OPTIONS, tie=False, trainable=["lm_head.*"])
    assert trained(build_model(options, VOCAB, base_of(options))) == {"lm_head.weight"}


def test_writing_the_vector_changes_only_the_trained_parameters():
    options = replace(OPTIONS, trainable=LAST)
    model = build_model(options, VOCAB, base_of(options))
    before = base_digest(frozen_weights(model))
    layout, vector = flatten(model)
    assert vector.numel() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    vector.zero_()
    assert not any(p.any() for p in model.parameters() if p.requires_grad)
    assert base_digest(frozen_weights(model)) == before
    assert layout.decayed == sum(
        p.numel() for p in model.parameters() if p.requires_grad and p.dim() >= 2
    )


@pytest.mark.parametrize("base", [None, "of another selection"])
def test_a_base_that_does_not_fit_is_refused(base):
    options = replace(OPTIONS, trainable=LAST)
    wrong = base and base_of(replace(OPTIONS, trainable=["transformer.h.1.*"]))
    with pytest.raises(ValueError, match="they differ in transformer"):
        build_model(options, VOCAB, wrong)
    with pytest.raises(ValueError, match="the model has 0 frozen parameters, the base holds"):
        build_model(OPTIONS, VOCAB, base_of(options))


def test_a_model_with_nothing_to_train_has_no_vector():
    model = GPT(OPTIONS, VOCAB)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        flatten(model)


def test_the_digest_depends_on_names_shapes_and_values():
    base = base_of(replace(OPTIONS, trainable=LAST))
    digest = base_digest(base)
    assert len(digest) == 64
    assert base_digest(dict(reversed(base.items()))) == digest, "order does not matter"
    assert base_digest({n: p.clone() for n, p in base.items()}) == digest
    name, weight = next(iter(base.items()))
    changed = weight.clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(torch.inf))
    others = (
        {**base, name: changed},
        {**base, name: weight.t()},
        {("other" if n == name else n): p for n, p in base.items()},
        {n: p for n, p in base.items() if n != name},
    )
    assert len({digest, *map(base_digest, others)}) == 5
