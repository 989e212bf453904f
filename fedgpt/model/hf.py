"""Hugging Face folders: config.json and model.safetensors, written and read without transformers.

What a folder must contain is in hf_folder.py, the families of models in hf_formats.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import SUMS, remove_temporary, replacing, sha256_of, write_text
from fedgpt.model.gpt import GPT
from fedgpt.model.hf_folder import CONFIG, HEAD, WEIGHTS, ModelFolder, Stored, read_folder
from fedgpt.model.hf_formats import FORMATS, model_type


def export_model(
    folder: str | Path, model: GPT, card: str | None = None, end_of_text: int | None = None
) -> None:
    """Write all of `model`, trained and frozen, as a Hugging Face folder.

    `card` becomes README.md, `end_of_text` defaults to the last token id. config.json, without
    which neither fedgpt nor transformers reads a folder, is removed first and written last. So a
    folder in which an export was stopped is no model. `Tokenizer.save` adds the tokenizer, before.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    remove_temporary(folder)
    end_of_text = model.vocab_size - 1 if end_of_text is None else end_of_text
    form, options = FORMATS[model_type(model.options)], model.options
    # named_parameters has a tied head once, as transformers' files do
    weights = {
        form.theirs(name): form.to_file(name, p.detach().cpu(), options).contiguous()
        for name, p in model.named_parameters()
    }
    dtype = model.lm_head.weight.dtype
    zeros = form.zeros(options).items()
    weights |= {form.theirs(name): torch.zeros(shape, dtype=dtype) for name, shape in zeros}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    config = form.config(options, model.vocab_size) | {
        **special,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # the same for transformers before 4.56
    }
    # without max_length, transformers generates beyond the model's positions
    generation = special | {"max_length": options.block_size}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if card is not None:
        write_text(folder / "README.md", card)
    write_text(folder / SUMS, f"{sha256_of(folder / WEIGHTS)}  {WEIGHTS}\n")
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def import_model(folder: str | Path) -> GPT:
    """Read a folder that `export_model` or transformers (GPT-2 or GPT-NeoX) wrote.

    The model is in float32, each tensor converted from its own dtype. Raises FedGPTError, naming
    file and reason, for what is missing, damaged or unsupported, and for weights that are not
    finite.
    """
    return load_model(read_folder(folder))


def load_model(found: ModelFolder) -> GPT:
    """The model in a folder whose config.json and names have been read; as `import_model`."""
    found.check_sum()
    model = GPT(found.options, found.vocab_size)
    _fill(model, found)
    return model


@torch.no_grad()
def _fill(model: GPT, found: ModelFolder) -> None:
    params = dict(model.named_parameters(remove_duplicate=False))
    files: dict[Path, list[tuple[str, Stored]]] = defaultdict(list)
    for name, stored in found.parameters.items():
        files[stored.path].append((name, stored))
    head = None
    for path, parts in files.items():
        try:
            with safe_open(path, framework="pt") as opened:
                for name, stored in parts:
                    p = _finite(opened.get_tensor(stored.name).float(), stored)
                    p = found.form.from_file(name, p, found.options)
                    if found.options.tie and name == HEAD:
                        head = p  # compared below, when the embedding is there
                    else:
                        params[name].copy_(p)
        except (SafetensorError, OSError) as error:
            raise FedGPTError(f"{path} is damaged: {error}") from None
    if head is not None and not torch.equal(head, model.lm_head.weight):
        raise FedGPTError(
            f"{found.parameters[HEAD].path}: {found.parameters[HEAD].name} differs from the"
            " embedding, but config.json ties them (tie_word_embeddings=true); set it to false"
        )
    for stored in found.zeros:
        with safe_open(stored.path, framework="pt") as opened:
            if opened.get_tensor(stored.name).any():
                raise FedGPTError(
                    f"{stored.path} is not supported: {stored.name} must be 0 where attention_bias"
                    " is false"
                )


def _finite(p: Tensor, stored: Stored) -> Tensor:
    if not p.isfinite().all():
        raise FedGPTError(
            f"{stored.path}: {stored.name} has values that are not finite in float32 (NaN or"
            " infinite); the model is damaged, or its training diverged"
        )
    return p
