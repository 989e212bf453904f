"""The model families of Hugging Face folders: config.json and weights, for export and import.

Options that GPT-2 can express become `model_type: gpt2`, rotary positions with layer norms
`model_type: gpt_neox`; transformers loads both. All others become `model_type: fedgpt`, with the
model's own names. A family that can be read and written is one `Format`, at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from fedgpt.core.options import ModelOptions
from fedgpt.model.gpt import NORM_EPS, ROTARY_BASE

ACTIVATIONS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# matrices that transformers' Conv1D stores as (in, out)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
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
NEOX_DEFAULTS = {  # what transformers assumes for a name that config.json does not have
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
# tensors in old files that are not parameters
NEOX_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
Weights = dict[str, Tensor]
# options that affect training but not the model's outputs, which config.json does not contain
TRAINING = {"trainable"}


@dataclass(frozen=True)
class Format:
    """One model_type: export and import of config.json and weights."""

    config: Callable[[ModelOptions, int], dict[str, Any]]  # options, vocab_size
    options: Callable[[dict[str, Any]], ModelOptions]
    to_file: Callable[[Weights, ModelOptions], Weights]
    from_file: Callable[[Weights, ModelOptions], Weights]


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


def _fedgpt_options(config: dict[str, Any]) -> ModelOptions:
    names = [field.name for field in fields(ModelOptions) if field.name not in TRAINING]
    return ModelOptions(**{name: config[name] for name in names})


def _gpt2_options(config: dict[str, Any]) -> ModelOptions:
    _check_fixed(config, GPT2_FIXED)
    channels = config["n_embd"]
    if config.get("n_inner") not in (None, 4 * channels):
        raise ValueError(f"n_inner={config['n_inner']}: must be 4 * n_embd={4 * channels} or null")
    rates = {name: config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return ModelOptions(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=channels,
        block_size=config["n_positions"],
        dropout=_one_rate(rates),
        positions="learned",
        gelu=_gelu("activation_function", config.get("activation_function", "gelu_new")),
        tie=config.get("tie_word_embeddings", True),
    )


def _neox_options(config: dict[str, Any]) -> ModelOptions:
    config = NEOX_DEFAULTS | config
    # rope_parameters since transformers 5, rope_scaling before
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    renamed = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    config |= {old: rope[new] for old, new in renamed.items() if new in rope}
    config["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    channels = config["hidden_size"]
    _check_fixed(config, NEOX_FIXED | {"rope_type": "default", "intermediate_size": 4 * channels})
    return ModelOptions(
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_embd=channels,
        block_size=config["max_position_embeddings"],
        dropout=_one_rate({name: config[name] for name in ("hidden_dropout", "attention_dropout")}),
        positions="rotary",
        bias=config["attention_bias"],
        gelu=_gelu("hidden_act", config["hidden_act"]),
        tie=config["tie_word_embeddings"],
    )


def _check_fixed(config: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, needed in fixed.items():
        if config.get(name, needed) != needed:
            raise ValueError(f"{name}={config[name]}: must be {needed}")


def _one_rate(rates: dict[str, float]) -> float:
    if len(set(rates.values())) > 1:
        *others, last = rates
        raise ValueError(
            f"{', '.join(others)} and {last} are {sorted(set(rates.values()))}: must be one rate"
        )
    return next(iter(rates.values()))


def _gelu(name: str, activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activation]


def _to_gpt2(weights: Weights, options: ModelOptions) -> Weights:
    return {name: _transposed(name, p) for name, p in weights.items()}


def _from_gpt2(weights: Weights, options: ModelOptions) -> Weights:
    """Our names and orientation for GPT-2's weights, with or without the `transformer.` prefix."""
    ours = {}
    for name, p in weights.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks in old files
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        ours[full] = _transposed(full, p)
    if options.tie:
        ours.pop("lm_head.weight", None)
    return ours


def _transposed(name: str, p: Tensor) -> Tensor:
    return p.t() if name.endswith(TRANSPOSED) else p


def _to_neox(weights: Weights, options: ModelOptions) -> Weights:
    """GPT-NeoX's names and order. Its MLP always has biases: a model without gets zeros."""
    if not options.bias:
        mlp = {name: p for name, p in weights.items() if ".mlp." in name}
        weights = weights | {
            name.replace(".weight", ".bias"): p.new_zeros(len(p)) for name, p in mlp.items()
        }
    theirs = {}
    for name, p in weights.items():
        full = name
        for ours, other in NEOX_NAMES.items():
            full = full.replace(ours, other)
        theirs[full] = _regrouped(name, p, 3, options.n_head)
    return theirs


def _from_neox(weights: Weights, options: ModelOptions) -> Weights:
    """The inverse of `_to_neox`; refuses MLP biases, which our options cannot express."""
    ours = {}
    for theirs, p in weights.items():
        if theirs.endswith(NEOX_BUFFERS):
            continue
        name = theirs
        for our, other in NEOX_NAMES.items():
            name = name.replace(other, our)
        if not options.bias and ".mlp." in name and name.endswith(".bias"):
            if p.any():
                raise ValueError(f"{theirs} must be 0 where attention_bias is false")
            continue
        ours[name] = _regrouped(name, p, options.n_head, 3)
    if options.tie:
        ours.pop("lm_head.weight", None)
    return ours


def _regrouped(name: str, p: Tensor, outer: int, inner: int) -> Tensor:
    """The rows of c_attn in the other order.

    Ours are (q k v, heads, width), those of GPT-NeoX (heads, q k v, width).
    """
    if ".c_attn." not in name or len(p) % (outer * inner):  # import_model names a wrong shape
        return p
    return p.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _unchanged(weights: Weights, options: ModelOptions) -> Weights:
    return weights


FORMATS = {
    "gpt2": Format(gpt2_config, _gpt2_options, _to_gpt2, _from_gpt2),
    "gpt_neox": Format(neox_config, _neox_options, _to_neox, _from_neox),
    "fedgpt": Format(fedgpt_config, _fedgpt_options, _unchanged, _unchanged),
}
