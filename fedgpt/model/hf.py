"""Hugging Face folders: config.json and model.safetensors, written and read without transformers.

Options that GPT-2 can express become `model_type: gpt2`, which transformers loads; all others `model_type: fedgpt`
with the model's own names. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import replacing, write_text
from fedgpt.core.options import ModelOptions
from fedgpt.model.gpt import GPT, NORM_EPS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ACTIVATIONS = {"gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers' Conv1D stores (in, out)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
# settings that change what GPT-2 computes, with the one value our model computes
FIXED = {
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def export_model(
    folder: str | Path,
    model: GPT,
    tokenizer_folder: str | Path | None = None,
    card: str | None = None,
    end_of_text: int | None = None,
) -> None:
    """Write `model` as a Hugging Face folder; `card` becomes README.md, `end_of_text` defaults to the last token id.

    Files already there are replaced one by one, each whole or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = model.vocab_size - 1 if end_of_text is None else end_of_text
    as_gpt2 = is_gpt2(model.options)
    weights = {name: p.detach().cpu() for name, p in model.named_parameters()}  # a tied head stands once
    if as_gpt2:
        weights = {name: _transposed(name, p) for name, p in weights.items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: p.contiguous() for name, p in weights.items()}, temporary, metadata={"format": "pt"})
    describe = gpt2_config if as_gpt2 else fedgpt_config
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    config = describe(model.options, model.vocab_size) | {
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
    """Read a folder that `export_model` or transformers (a GPT-2) wrote; the model has the dtype of its weights.

    Raises FedGPTError naming file and reason for what is missing or unsupported.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FedGPTError(f"{folder}: no config.json; expected a Hugging Face folder with config.json and {WEIGHTS}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in ("gpt2", "fedgpt"):
        raise FedGPTError(f"{folder}/config.json: model_type={kind!r} is not supported; allowed are gpt2 and fedgpt")
    try:
        options = _gpt2_options(config) if kind == "gpt2" else _fedgpt_options(config)
        model = GPT(options, int(config["vocab_size"]))
    except KeyError as missing:
        raise FedGPTError(f"{folder}/config.json: {missing} is missing") from None
    except (ConfigError, TypeError, ValueError) as problem:
        raise FedGPTError(f"{folder}/config.json is not supported: {problem}") from None
    weights = _read_weights(folder)
    if kind == "gpt2":
        weights = _from_gpt2(weights, options)
    _fill(model, weights, folder)
    return model


def is_gpt2(options: ModelOptions) -> bool:
    """True where transformers' GPT2LMHeadModel computes the same function."""
    return options.positions == "learned" and options.norm == "layernorm" and options.bias


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
    } | FIXED


def fedgpt_config(options: ModelOptions, vocab_size: int) -> dict[str, Any]:
    """config.json for what GPT-2 cannot express: every model option by its own name."""
    return {"model_type": "fedgpt", "architectures": ["GPT"], "vocab_size": vocab_size} | asdict(options)


def _fedgpt_options(config: dict[str, Any]) -> ModelOptions:
    return ModelOptions(**{field.name: config[field.name] for field in fields(ModelOptions)})


def _gpt2_options(config: dict[str, Any]) -> ModelOptions:
    for name, needed in FIXED.items():
        if config.get(name, needed) != needed:
            raise ValueError(f"{name}={config[name]}: must be {needed}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation_function={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    channels = config["n_embd"]
    if config.get("n_inner") not in (None, 4 * channels):
        raise ValueError(f"n_inner={config['n_inner']}: must be 4 * n_embd={4 * channels} or null")
    rates = {config.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    if len(rates) > 1:
        raise ValueError(f"resid_pdrop, embd_pdrop and attn_pdrop are {sorted(rates)}: must be one rate")
    return ModelOptions(
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        n_embd=channels,
        block_size=config["n_positions"],
        dropout=rates.pop(),
        gelu=ACTIVATIONS[activation],
        tie=config.get("tie_word_embeddings", True),
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).is_file():
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = [WEIGHTS]
    weights: dict[str, Tensor] = {}
    for shard in shards:
        path = folder / Path(shard).name  # a name with folders in it must not lead elsewhere
        if not path.is_file():
            raise FedGPTError(f"{path} is missing; only safetensors is read, save with save_pretrained(...) anew")
        weights |= load_file(path)
    return weights


def _from_gpt2(weights: dict[str, Tensor], options: ModelOptions) -> dict[str, Tensor]:
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


@torch.no_grad()
def _fill(model: GPT, weights: dict[str, Tensor], folder: Path) -> None:
    params = dict(model.named_parameters())
    missing, extra = sorted(params.keys() - weights.keys()), sorted(weights.keys() - params.keys())
    if missing or extra:
        raise FedGPTError(f"{folder}/{WEIGHTS} does not fit config.json: missing {missing[:5]}, unexpected {extra[:5]}")
    model.to(next(iter(weights.values())).dtype)
    for name, p in params.items():
        if p.shape != weights[name].shape:
            raise FedGPTError(
                f"{folder}/{WEIGHTS}: {name} has shape {tuple(weights[name].shape)}, config.json says {tuple(p.shape)}"
            )
        p.copy_(weights[name])


def _copy_tokenizer(source: Path, folder: Path, block_size: int, end_of_text: int) -> None:
    """Copy what transformers needs; write a tokenizer_config.json where the tokenizer has none."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not (source / "tokenizer.json").is_file() and not found:
        raise FedGPTError(f"{source}: no tokenizer found; expected one of {', '.join(TOKENIZER_FILES)}")
    for path in found:
        if path.resolve() != (folder / path.name).resolve():
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        text = next((token["content"] for token in added if token["id"] == end_of_text), None)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
        if text is not None:
            config |= {"bos_token": text, "eos_token": text}
        write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
