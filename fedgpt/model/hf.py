"""Hugging Face folders: config.json and model.safetensors, written and read without transformers.

Options that GPT-2 can express become `model_type: gpt2`, rotary positions with layer norms
`model_type: gpt_neox`; both load in transformers. All others become `model_type: fedgpt` with the
model's own names. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import replacing, write_text
from fedgpt.core.options import ModelOptions
from fedgpt.model.gpt import GPT, NORM_EPS, ROTARY_BASE

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ACTIVATIONS = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
# transformers' Conv1D stores (in, out)
TRANSPOSED = (
    "c_attn.weight",
    "c_proj.weight",
    "c_fc.weight",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
# settings that change what GPT-2 and GPT-NeoX compute, with the one value our model computes
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
# what config.json says of a model; which parameters are trained is a matter of each run
SHAPE = [field.name for field in fields(ModelOptions) if field.name != "trainable"]
NEOX_DEFAULTS = {  # what transformers assumes where config.json is silent
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
# old files carry them
NEOX_BUFFERS = (
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """One model_type: what config.json and weights are for our options and parameters, and the way
    back.
    """

    config: Callable[[ModelOptions, int], dict[str, Any]]  # options, vocab_size
    options: Callable[[dict[str, Any]], ModelOptions]
    to_file: Callable[[Weights, ModelOptions], Weights]
    from_file: Callable[[Weights, ModelOptions], Weights]


def export_model(
    folder: str | Path,
    model: GPT,
    tokenizer_folder: str | Path | None = None,
    card: str | None = None,
    end_of_text: int | None = None,
) -> None:
    """Write `model` as a Hugging Face folder; `card` becomes README.md, `end_of_text` defaults to
    the last token id.

    Files already there are replaced one by one, each whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = model.vocab_size - 1 if end_of_text is None else end_of_text
    form = FORMATS[model_type(model.options)]
    # a tied head stands once
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}
    weights = form.to_file(weights, model.options)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(
            {name: p.contiguous() for name, p in weights.items()},
            temporary,
            metadata={"format": "pt"},
        )
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = form.config(model.options, model.vocab_size) | {
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers before 4.56
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if tokenizer_folder is not None:
        _copy_tokenizer(Path(tokenizer_folder), folder, model.options.block_size, end_of_text)
    if card is not None:
        write_text(folder / "README.md", card)


def import_model(folder: str | Path) -> GPT:
    """Read a folder that `export_model` or transformers (a GPT-2 or GPT-NeoX) wrote; the dtype is
    that of its weights.

    Raises FedGPTError naming file and reason for what is missing or unsupported.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FedGPTError(
            f"{folder}: no config.json; expected a Hugging Face folder with config.json and"
            f" {WEIGHTS}"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as damage:  # no JSON, or no text
        raise FedGPTError(f"{folder}/config.json is damaged: {damage}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FORMATS:
        *others, last = FORMATS
        allowed = f"{', '.join(others)} and {last}"
        raise FedGPTError(
            f"{folder}/config.json: model_type={kind!r} is not supported; allowed are {allowed}"
        )
    try:
        options = FORMATS[kind].options(config)
        model = GPT(options, int(config["vocab_size"]))
    except KeyError as missing:
        raise FedGPTError(f"{folder}/config.json: {missing} is missing") from None
    except (ConfigError, TypeError, ValueError) as problem:
        raise FedGPTError(f"{folder}/config.json is not supported: {problem}") from None
    weights = _read_weights(folder)
    try:
        weights = FORMATS[kind].from_file(weights, options)
    except ValueError as problem:
        raise FedGPTError(f"{folder}/{WEIGHTS} is not supported: {problem}") from None
    _fill(model, weights, folder)
    return model


def model_type(options: ModelOptions) -> str:
    """The format for `options`: gpt2 or gpt_neox where transformers' model computes the same
    function, else fedgpt.
    """
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
    """config.json for transformers' GPTNeoXForCausalLM; its rotary positions turn the same channel
    pairs as ours.
    """
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
    """config.json for what the others cannot express: every model option by its own name."""
    about = {"model_type": "fedgpt", "architectures": ["GPT"], "vocab_size": vocab_size}
    return about | {name: value for name, value in asdict(options).items() if name in SHAPE}


def _fedgpt_options(config: dict[str, Any]) -> ModelOptions:
    return ModelOptions(**{name: config[name] for name in SHAPE})


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
    # the former since transformers 5
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


def _read_weights(folder: Path) -> Weights:
    if (folder / INDEX).is_file():
        shards = sorted(
            set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
    else:
        shards = [WEIGHTS]
    weights: Weights = {}
    for shard in shards:
        path = folder / Path(shard).name  # a name with folders in it must not lead elsewhere
        if not path.is_file():
            raise FedGPTError(
                f"{path} is missing; only safetensors is read, save with save_pretrained(...) anew"
            )
        weights |= load_file(path)
    return weights


def _to_gpt2(weights: Weights, options: ModelOptions) -> Weights:
    return {name: _transposed(name, p) for name, p in weights.items()}


def _from_gpt2(weights: Weights, options: ModelOptions) -> Weights:
    """Our names and orientation for GPT-2's weights, with or without the `transformer.` prefix."""
    ours = {}
    for name, p in weights.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files carry
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        ours[full] = _transposed(full, p)
    if options.tie:
        ours.pop("lm_head.weight", None)
    return ours


def _transposed(name: str, p: Tensor) -> Tensor:
    return p.t() if name.endswith(TRANSPOSED) else p


def _to_neox(weights: Weights, options: ModelOptions) -> Weights:
    """GPT-NeoX's names and order; its MLP has biases always, so a model without gets zeros."""
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
    """The way back from `_to_neox`; refuses MLP biases that the options have no place for."""
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
    """The rows of c_attn in the other order: ours are (q k v, heads, width), GPT-NeoX's (heads, q k
    v, width).
    """
    if ".c_attn." not in name or len(p) % (outer * inner):  # a wrong shape is named by _fill
        return p
    return p.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def _fill(model: GPT, weights: Weights, folder: Path) -> None:
    params = dict(model.named_parameters())
    missing, extra = sorted(params.keys() - weights.keys()), sorted(weights.keys() - params.keys())
    if missing or extra:
        raise FedGPTError(
            f"{folder}/{WEIGHTS} does not fit config.json: missing {missing[:5]}, unexpected"
            f" {extra[:5]}"
        )
    model.to(next(iter(weights.values())).dtype)
    for name, p in params.items():
        if p.shape != weights[name].shape:
            raise FedGPTError(
                f"{folder}/{WEIGHTS}: {name} has shape {tuple(weights[name].shape)}, config.json"
                f" says {tuple(p.shape)}"
            )
        p.copy_(weights[name])


def _copy_tokenizer(source: Path, folder: Path, block_size: int, end_of_text: int) -> None:
    """Copy what transformers needs; write a tokenizer_config.json where the tokenizer has none."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not (source / "tokenizer.json").is_file() and not found:
        raise FedGPTError(
            f"{source}: no tokenizer found; expected one of {', '.join(TOKENIZER_FILES)}"
        )
    for path in found:
        if path.resolve() != (folder / path.name).resolve():
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get(
            "added_tokens", []
        )
        text = next((token["content"] for token in added if token["id"] == end_of_text), None)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
        if text is not None:
            config |= {"bos_token": text, "eos_token": text}
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def _unchanged(weights: Weights, options: ModelOptions) -> Weights:
    return weights


FORMATS = {
    "gpt2": Format(gpt2_config, _gpt2_options, _to_gpt2, _from_gpt2),
    "gpt_neox": Format(neox_config, _neox_options, _to_neox, _from_neox),
    "fedgpt": Format(fedgpt_config, _fedgpt_options, _unchanged, _unchanged),
}
