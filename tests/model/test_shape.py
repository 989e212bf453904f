import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.advice import advises

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions
from fedgpt.model.build import freeze
from fedgpt.model.gpt import GPT
from fedgpt.model.shape import (
    count_activations,
    count_parameters,
    count_trainable,
    parameter_shapes,
    trainable_problems,
)

PRESETS = {
    path.stem: path
    for path in sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
}


def preset(name: str) -> ModelOptions:
    lines = [
        line
        for line in PRESETS[name].read_text().splitlines()
        if ":" in line and not line.startswith("#")
    ]
    values = dict(line.split(":") for line in lines)
    texts = {key: value.split("#")[0].strip() for key, value in values.items()}
    return ModelOptions(
        **{k: int(v) if v.isdigit() else {"true": True}.get(v, v) for k, v in texts.items()}
    )


def parameters(model: GPT) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["nano", "micro", "mini", "gpt2"])
def test_counted_parameters_of_presets_are_those_of_the_module(name, monkeypatch):
    options, vocab = preset(name), 50_257 if name == "gpt2" else 4_097
    assert not list(options.problems())
    counted = count_parameters(options, vocab)
    monkeypatch.setattr(GPT, "init_weights", lambda *_, **__: None)  # saves a second for gpt2
    assert counted == parameters(GPT(options, vocab))
    assert f"{counted:,}" in PRESETS[name].read_text().splitlines()[0]


def test_gpt2_has_the_published_size():
    assert count_parameters(preset("gpt2"), 50_257) == 124_439_808


@pytest.mark.parametrize(
    "change", [{}, {"tie": False}, {"bias": False}, {"norm": "rmsnorm"}, {"positions": "rotary"}]
)
def test_counted_parameters_of_variants_are_those_of_the_module(change):
    options = replace(
        ModelOptions(n_layer=2, n_head=2, n_embd=16, block_size=8, positions="learned"), **change
    )
    assert count_parameters(options, 11) == parameters(GPT(options, 11))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": 130}, "model.n_embd=130: must be a multiple of model.n_head=4; try 128 or 132"),
        ({"n_embd": 3}, "model.n_embd=3: must be a multiple of model.n_head=4; try 4"),
        (
            {"n_embd": 132, "positions": "rotary"},
            "model.n_embd=132: model.positions=rotary needs a multiple of 2 * model.n_head=8;"
            " try 128 or 136",
        ),
        ({"n_kv_head": 3}, "model.n_kv_head=3: must be a divisor of model.n_head=4, so that each"),
        ({"n_kv_head": 8}, "model.n_kv_head=8: must be a divisor of model.n_head=4, so that each"),
        ({"n_kv_head": 0}, "model.n_kv_head=0: must be at least 1"),
        ({"head_dim": 0}, "model.head_dim=0: must be at least 1"),
        ({"n_inner": 0}, "model.n_inner=0: must be at least 1"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0: must be above 0 and at most 1"),
        ({"rope_theta": 0.5}, "model.rope_theta=0.5: must be at least 1"),
        ({"mlp": "silu"}, "model.mlp=silu: must be gelu or swiglu"),
        ({"n_layer": 0}, "model.n_layer=0: must be at least 1"),
        ({"dropout": 1.0}, "model.dropout=1.0: must be from 0 to below 1"),
        (
            {"norm": "rmsnrom"},
            "model.norm=rmsnrom: must be layernorm or rmsnorm; did you mean 'rmsnorm'?",
        ),
    ],
)
def test_problems_name_the_option_as_typed(change, message):
    problems = list(replace(ModelOptions(positions="learned"), **change).problems())
    assert len(problems) == 1
    assert problems[0].startswith(message)


@pytest.mark.parametrize(
    ("change", "message", "remedy"),
    [
        (
            {"partial_rotary_factor": 0.1},
            "model.partial_rotary_factor=0.1: rotates 3 of the 32 channels of a head, but they",
            {"partial_rotary_factor": 0.125},
        ),
        (
            {"partial_rotary_factor": 0.0},
            "model.partial_rotary_factor=0.0: rotates 0 of the 32 channels of a head, but they",
            {"partial_rotary_factor": 0.0625},
        ),
        (
            {"head_dim": 7},
            "model.head_dim=7: model.positions=rotary needs an even number; try 8",
            {"head_dim": 8},
        ),
    ],
)
def test_heads_of_rotary_positions_need_pairs_of_channels(change, message, remedy):
    options = replace(ModelOptions(positions="rotary"), **change)
    (problem,) = options.problems()
    assert problem.startswith(message)
    advises(problem, f"try {next(iter(remedy.values()))}")
    assert not list(replace(options, **remedy).problems())
    assert not list(replace(options, positions="learned").problems())


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ConfigError) as caught:
        GPT(ModelOptions(n_layer=1, vocab_size=10), 11)
    advises(
        caught.value,
        "model.vocab_size=10: the tokenizer has 11 tokens; set model.vocab_size=11 or larger, or"
        " leave it out",
    )
    for rows, found in ((11, 11), (64, 64), (None, 11)):
        assert GPT(ModelOptions(n_layer=1, vocab_size=rows), 11).vocab_size == found


def test_all_problems_are_reported_at_once():
    wrong = ModelOptions(n_layer=0, n_embd=130, gelu="x", positions="y", block_size=-1)
    assert len(list(wrong.problems())) == 5
    assert len(list(ModelOptions(n_head=0).problems())) == 1


def test_importing_shape_does_not_import_torch():
    """A fresh interpreter, as another test may have imported torch."""
    code = "import sys, fedgpt.model.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


FAMILIES = [
    {"norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 1, "n_inner": 24, "bias": False},
    {"mlp": "swiglu", "head_dim": 6, "mlp_bias": False, "vocab_size": 13},
    {"parallel_residual": True, "partial_rotary_factor": 0.5, "qkv_bias": False},
]


@pytest.mark.parametrize(
    "change",
    [
        *({}, {"tie": False}, {"bias": False}, {"norm": "rmsnorm"}, {"positions": "rotary"}),
        *FAMILIES,
    ],
)
def test_names_and_shapes_are_those_of_the_module(change):
    options = replace(ModelOptions(n_layer=2, n_head=2, n_embd=16, block_size=8), **change)
    module = GPT(options, 11).named_parameters(remove_duplicate=False)
    shapes = {name: tuple(p.shape) for name, p in module}
    assert list(parameter_shapes(options, 11).items()) == list(shapes.items())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["transformer.h.7.*", "transformer.wpe.weight"],
            "model.trainable=[transformer.h.7.*]: selects no parameter of this model; take names"
            " such as transformer.wte.weight, with * for any characters; did you mean"
            " 'transformer.h.1.*'",
        ),
        ([""], "model.trainable=['']: selects no parameter of this model; take names such as"),
        (
            ["lm_haed.*"],
            "model.trainable=[lm_haed.*]: selects no parameter of this model; take names such as"
            " transformer.wte.weight, with * for any characters; did you mean 'lm_head.*'",
        ),
    ],
)
def test_a_pattern_that_selects_nothing_is_refused(patterns, message):
    options = ModelOptions(n_layer=2, positions="learned", trainable=patterns)
    (problem,) = trainable_problems(options)
    assert problem.startswith(message)


def test_positions_that_the_model_does_not_have_cannot_be_trained():
    options = ModelOptions(positions="rotary", trainable=["transformer.wpe.*"])
    (problem,) = trainable_problems(options)
    assert "selects no parameter of this model" in problem


@pytest.mark.parametrize(
    "patterns", [[], ["*"], ["lm_head.*"], ["transformer.h.1.*", "*.bias"], ["*.wte.*"]]
)
@pytest.mark.parametrize("tie", [True, False])
def test_counted_trainable_parameters_are_those_of_the_module(patterns, tie):
    options = ModelOptions(
        n_layer=2, n_head=2, n_embd=16, block_size=8, tie=tie, trainable=patterns
    )
    module = GPT(options, 11)
    freeze(module, patterns)
    counted = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert count_trainable(options, 11) == counted


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "rmsnorm"},
        {"dropout": 0.1},
        {"positions": "learned"},
        {"trainable": ["*head*"]},
        {"mlp": "swiglu", "norm": "rmsnorm", "n_kv_head": 2, "n_inner": 88, "bias": False},
        {"head_dim": 16, "vocab_size": 300},
    ],
    ids=str,
)
def test_a_step_keeps_at_least_the_activations_that_are_counted(change):
    """In bf16, and not many more: the count is not far below what torch keeps."""
    options = replace(ModelOptions(n_layer=3, n_embd=32, block_size=16), tie=False, **change)
    model = GPT(options, 257).to(torch.bfloat16).train()
    freeze(model, options.trainable)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    ids = torch.zeros(8, 16, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(ids, ids)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = 2 * ids.numel() * count_activations(options, 257)
    assert counted <= found <= 2 * counted
