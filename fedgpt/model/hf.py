"""Hugging Face folders: config.json and model.safetensors, written and read without transformers.

What a folder must contain is in hf_folder.py, the families of models in families/.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import SUMS, remove_temporary, replacing, sha256_of, write_text
from fedgpt.model.gguf import read_gguf
from fedgpt.model.gpt import GPT
from fedgpt.model.hf_folder import CONFIG, GGUF, HEAD, WEIGHTS, ModelFolder, Stored, read_folder
from fedgpt.model.hf_formats import family_for


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
    options, dtype = model.options, model.lm_head.weight.dtype
    family = family_for(options)
    weights: dict[str, Tensor] = {}
    # named_parameters has a tied head once, as transformers' files do
    for name, p in model.named_parameters():
        parts = family.to_file(name, p.detach().cpu(), options)
        for stored, part in zip(family.theirs(name), parts, strict=True):
            weights[stored] = part.contiguous()
    for name, shape in family.zeros(options).items():
        (stored,) = family.theirs(name)
        weights[stored] = torch.zeros(shape, dtype=dtype)
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    dtype_name = str(dtype).removeprefix("torch.")
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    config = family.config(options, model.vocab_size) | {
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
    """Read a folder that `export_model` or transformers wrote, of a family in hf_formats.py.

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
    head = None
    with ExitStack() as stack:
        files = _Files(stack)
        for name, parts in found.parameters.items():
            tensors = tuple(map(files.finite, parts))
            p = found.family.from_file(name, tensors, found.options)
            if found.options.tie and name == HEAD:
                head = p  # compared below, when the embedding is there
            else:
                params[name].copy_(p)
        for stored in found.zeros:
            if files.finite(stored).any():
                raise FedGPTError(
                    f"{stored.path} is not supported: {stored.name} must be 0 where attention_bias"
                    " is false"
                )
    if head is not None and not torch.equal(head, model.lm_head.weight):
        (stored,) = found.parameters[HEAD]
        raise FedGPTError(
            f"{stored.path}: {stored.name} differs from the embedding, but config.json ties them"
            " (tie_word_embeddings=true); set it to false"
        )


class _Files:
    """The weight files of a folder, each opened once and closed with `stack`."""

    def __init__(self, stack: ExitStack):
        self._stack, self._opened = stack, {}

    def finite(self, stored: Stored) -> Tensor:
        """A tensor in float32; raises FedGPTError if it cannot be read, or has NaN or infinity."""
        if stored.dtype == GGUF:
            if stored.path not in self._opened:
                self._opened[stored.path] = read_gguf(stored.path)
            return torch.from_numpy(self._opened[stored.path].read(stored.name))
        try:
            if stored.path not in self._opened:
                opened = self._stack.enter_context(safe_open(stored.path, framework="pt"))
                self._opened[stored.path] = opened
            p = self._opened[stored.path].get_tensor(stored.name).float()
        except (SafetensorError, OSError) as error:
            raise FedGPTError(f"{stored.path} is damaged: {error}") from None
        return _finite(p, stored)


def _finite(p: Tensor, stored: Stored) -> Tensor:
    if not p.isfinite().all():
        raise FedGPTError(
            f"{stored.path}: {stored.name} has values that are not finite in float32 (NaN or"
            " infinite); the model is damaged, or its training diverged"
        )
    return p
