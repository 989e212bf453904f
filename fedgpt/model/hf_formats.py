"""The model families of Hugging Face folders: config.json and weights, for export and import.

Options that GPT-2 can express become `model_type: gpt2`, rotary positions with layer norms
`model_type: gpt_neox`; transformers loads both. All others become `model_type: fedgpt`, with the
model's own names. A family that can be read and written is one `Format`, at the end of this file.

This file is free of torch, so that a folder can be checked before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedgpt.core.options import ModelOptions
from fedgpt.core.options.option import KINDS, described, is_a
from fedgpt.model.shape import NORM_EPS, ROTARY_BASE, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# settings that change what GPT-2 and GPT-NeoX compute, with the one value that our model computes
GPT2_FIXED = {
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
NEOX_FIXED = {
    "layer_norm_eps": NORM_EPS,
    "use_parallel_residual": False,
    "rotary_pct": 1.0,
    "rotary_emb_base": ROTARY_BASE,
}
# what transformers assumes for a name that config.json does not have
GPT2_DEFAULTS = {
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "tie_word_embeddings": True,
}
NEOX_DEFAULTS = {
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
    "intermediate_size": 24576,
    "attention_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
NEOX_NAMES = {  # parts of our parameter names -> parts of GPT-NeoX's
    "transformer.wte.": "gpt_neox.embed_in.",
    "transformer.h.": "gpt_neox.layers.",
    "transformer.ln_f.": "gpt_neox.final_layer_norm.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_attn.": ".attention.query_key_value.",
    ".attn.c_proj.": ".attention.dense.",
    ".mlp.c_fc.": ".mlp.dense_h_to_4h.",
    ".mlp.c_proj.": ".mlp.dense_4h_to_h.",
    # files keep this name; the module is called lm_head since transformers 5
    "lm_head.": "embed_out.",
}
# options that affect training but not the model's outputs, which config.json does not contain
TRAINING = {"trainable"}


@dataclass(frozen=True)
class Format:
    """One model_type: config.json, and the names and the layout of the tensors in its files."""

    config: Callable[[ModelOptions, int], dict[str, Any]]  # options, vocab_size
    options: Callable[[dict[str, Any]], ModelOptions]
    prefix: str = ""  # start of the names, which some files leave out
    names: Mapping[str, str] = field(default_factory=dict)  # parts of our names -> of the file's
    transposed: tuple[str, ...] = ()  # ends of names: matrices that are stored as (in, out)
    by_head: bool = False  # rows of c_attn are (heads, q k v, width) instead of (q k v, heads, ..)
    skipped: tuple[str, ...] = ()  # ends of names: tensors in old files that are not parameters
    mlp_biases: bool = False  # the MLP always has biases; a model without stores zeros

    def theirs(self, name: str) -> str:
        """The file's name of a parameter."""
        for ours, theirs in self.names.items():
            name = name.replace(ours, theirs)
        return name

    def full(self, name: str) -> str:
        """A name in a file, with the prefix that some files leave out."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def zeros(self, options: ModelOptions) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that a file contains and our model does not have."""
        if options.bias or not self.mlp_biases:
            return {}
        shapes = parameter_shapes(replace(options, bias=True), vocab_size=1)
        return {name: s for name, s in shapes.items() if ".mlp." in name and len(s) == 1}

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in a file of a parameter that has `name` and `shape` in our model."""
        return shape[::-1] if name.endswith(self.transposed) else shape

    def to_file(self, name: str, p: Tensor, options: ModelOptions) -> Tensor:
        """A parameter in the layout of the file."""
        if self.by_head and ".c_attn." in name:
            return _regrouped(p, 3, options.n_head)
        return p.t() if name.endswith(self.transposed) else p

    def from_file(self, name: str, p: Tensor, options: ModelOptions) -> Tensor:
        """The inverse of `to_file`; `name` is ours."""
        if self.by_head and ".c_attn." in name:
            return _regrouped(p, options.n_head, 3)
        return p.t() if name.endswith(self.transposed) else p


def model_type(options: ModelOptions) -> str:
    """The format for `options`: fedgpt unless one of transformers' models computes the same."""
    if options.norm == "layernorm" and options.positions == "rotary":
        return "gpt_neox"
    return "gpt2" if options.norm == "layernorm" and options.bias else "fedgpt"


def gpt2_config(options: ModelOptions, vocab_size: int) -> dict[str, Any]:
    """config.json for transformers' GPT2LMHeadModel."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size,
        "n_positions": options.block_size,
        "n_embd": options.n_embd,
        "n_layer": options.n_layer,
        "n_head": options.n_head,
        "n_inner": None,
        "activation_function": "gelu" if options.gelu == "exact" else "gelu_new",
        "resid_pdrop": options.dropout,
        "embd_pdrop": options.dropout,
        "attn_pdrop": options.dropout,
        "initializer_range": 0.02,
        "tie_word_embeddings": options.tie,
    } | GPT2_FIXED


def neox_config(options: ModelOptions, vocab_size: int) -> dict[str, Any]:
    """config.json for transformers' GPTNeoXForCausalLM, whose rotary positions are like ours."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": vocab_size,
        "max_position_embeddings": options.block_size,
        "hidden_size": options.n_embd,
        "num_hidden_layers": options.n_layer,
        "num_attention_heads": options.n_head,
        "intermediate_size": 4 * options.n_embd,
        "hidden_act": "gelu" if options.gelu == "exact" else "gelu_new",
        "hidden_dropout": options.dropout,
        "attention_dropout": options.dropout,
        "attention_bias": options.bias,
        "initializer_range": 0.02,
        "tie_word_embeddings": options.tie,
    } | NEOX_FIXED


def fedgpt_config(options: ModelOptions, vocab_size: int) -> dict[str, Any]:
    """config.json for options that the other formats cannot express: every model option by name."""
    ours = {name: value for name, value in asdict(options).items() if name not in TRAINING}
    return {"model_type": "fedgpt", "architectures": ["GPT"], "vocab_size": vocab_size} | ours


def whole(config: Mapping[str, Any], name: str) -> int:
    """The whole number `name`, which config.json must have; raises ValueError below 1."""
    number = _value(config, name, int)
    if number < 1:
        raise ValueError(f"{name}={number}: must be at least 1")
    return number


def _fedgpt_options(config: dict[str, Any]) -> ModelOptions:
    kinds = {one.name: one.kinds[0] for one in described(ModelOptions) if one.name not in TRAINING}
    return ModelOptions(**{name: _value(config, name, kind) for name, kind in kinds.items()})


def _gpt2_options(config: dict[str, Any]) -> ModelOptions:
    config = GPT2_DEFAULTS | config
    channels = whole(config, "n_embd")
    _check_fixed(config, GPT2_FIXED)
    if config.get("n_inner") not in (None, 4 * channels):
        raise ValueError(f"n_inner={config['n_inner']}: must be 4 * n_embd={4 * channels} or null")
    return ModelOptions(
        n_layer=whole(config, "n_layer"),
        n_head=whole(config, "n_head"),
        n_embd=channels,
        block_size=whole(config, "n_positions"),
        dropout=_one_rate(config, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        positions="learned",
        gelu=_gelu(config, "activation_function"),
        tie=_value(config, "tie_word_embeddings", bool),
    )


def _neox_options(config: dict[str, Any]) -> ModelOptions:
    config = NEOX_DEFAULTS | config
    # rope_parameters since transformers 5, rope_scaling before
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = _value(config, name, dict) if config.get(name) else {}
    renamed = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    config |= {old: rope[new] for old, new in renamed.items() if new in rope}
    config["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    channels = whole(config, "hidden_size")
    _check_fixed(config, NEOX_FIXED | {"rope_type": "default", "intermediate_size": 4 * channels})
    return ModelOptions(
        n_layer=whole(config, "num_hidden_layers"),
        n_head=whole(config, "num_attention_heads"),
        n_embd=channels,
        block_size=whole(config, "max_position_embeddings"),
        dropout=_one_rate(config, "hidden_dropout", "attention_dropout"),
        positions="rotary",
        bias=_value(config, "attention_bias", bool),
        gelu=_gelu(config, "hidden_act"),
        tie=_value(config, "tie_word_embeddings", bool),
    )


def _value(config: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in config:
        raise ValueError(f"{name} is missing")
    if not is_a(config[name], kind):
        words = KINDS.get(kind, "a mapping")
        raise ValueError(f"{name}={config[name]!r}: must be {words}")
    return config[name]


def _check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for name, needed in fixed.items():
        if config.get(name, needed) != needed:
            raise ValueError(f"{name}={config[name]!r}: must be {needed!r}")


def _one_rate(config: Mapping[str, Any], *names: str) -> float:
    rates = {_value(config, name, float) for name in names}
    if len(rates) > 1:
        *others, last = names
        raise ValueError(f"{', '.join(others)} and {last} are {sorted(rates)}: must be one rate")
    return float(rates.pop())


def _gelu(config: Mapping[str, Any], name: str) -> str:
    activation = _value(config, name, str)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def _regrouped(p: Tensor, outer: int, inner: int) -> Tensor:
    """The rows (outer, inner, width) of `p` as (inner, outer, width)."""
    return p.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


FORMATS = {
    "gpt2": Format(
        gpt2_config,
        _gpt2_options,
        prefix="transformer.",
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
        skipped=(".attn.bias", ".attn.masked_bias"),
    ),
    "gpt_neox": Format(
        neox_config,
        _neox_options,
        names=NEOX_NAMES,
        by_head=True,
        skipped=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
        mlp_biases=True,
    ),
    "fedgpt": Format(fedgpt_config, _fedgpt_options),
}
