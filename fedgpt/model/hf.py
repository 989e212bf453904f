"""Hugging Face folders: config.json and model.safetensors, written and read without transformers.

The families of models are in hf_formats.py. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import replacing, write_text
from fedgpt.model.gpt import GPT
from fedgpt.model.hf_formats import FORMATS, Weights, model_type

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)


def export_model(
    folder: str | Path,
    model: GPT,
    tokenizer_folder: str | Path | None = None,
    card: str | None = None,
    end_of_text: int | None = None,
) -> None:
    """Write all of `model`, trained and frozen, as a Hugging Face folder.

    `card` becomes README.md, `end_of_text` defaults to the last token id. Existing files are
    replaced one by one, each completely or not at all.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = model.vocab_size - 1 if end_of_text is None else end_of_text
    form = FORMATS[model_type(model.options)]
    # named_parameters has a tied head once, as transformers' files do
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
    """Read a folder that `export_model` or transformers (GPT-2 or GPT-NeoX) wrote.

    The model has the dtype of the file's weights. Raises FedGPTError, naming file and reason, for
    what is missing or unsupported.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FedGPTError(
            f"{folder}: no config.json; expected a Hugging Face folder with config.json and"
            f" {WEIGHTS}"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as damage:  # not JSON, or not text
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


def _read_weights(folder: Path) -> Weights:
    if (folder / INDEX).is_file():
        shards = sorted(
            set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
    else:
        shards = [WEIGHTS]
    weights: Weights = {}
    for shard in shards:
        path = folder / Path(shard).name  # a name with a path must not leave the folder
        if not path.is_file():
            raise FedGPTError(
                f"{path} is missing; only safetensors is read, save with save_pretrained(...) anew"
            )
        weights |= load_file(path)
    return weights


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
    """Copy the files that transformers needs; write a tokenizer_config.json if there is none."""
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
