"""A model in a GGUF file, in the words of Hugging Face: config.json and tensors.

    model = read_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
    model.config["hidden_size"]                                  # 576
    model.tensors["model.norm.weight"]                           # shape (576,), dtype F32
    model.read("model.norm.weight")                              # its values in float32

The container is in core/gguf_file.py, number formats in core/gguf_blocks.py, families in
gguf_families.py and the tokenizer in data/gguf_tokenizer.py. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgpt.core.gguf_file import GGUFFile, read_gguf_file
from fedgpt.model.gguf_families import Family, Sizes, config_of, family_of


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a Hugging Face folder would have it."""

    name: str  # in the GGUF file
    shape: tuple[int, ...]
    dtype: str  # of the GGUF file: F32, Q4_1, ...


@dataclass(frozen=True)
class GGUFModel:
    """The content of a GGUF file whose names, sizes and shapes fit its metadata."""

    file: GGUFFile
    family: Family
    sizes: Sizes
    config: dict[str, Any]  # the content of config.json
    tensors: Mapping[str, StoredTensor]  # by Hugging Face's names

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    def read(self, name: str) -> np.ndarray:
        """The values of a tensor, in float32 and in the layout of Hugging Face.

        `name` is one of `tensors`. Only this tensor is in memory. Raises FedGPTError if a value is
        not finite.
        """
        stored = self.tensors[name].name
        return self.family.to_theirs(stored, self.file.read(stored), self.sizes)


def read_gguf(path: str | Path) -> GGUFModel:
    """Read all of a GGUF file but the values of its tensors.

    Versions 2 and 3, little-endian; families and number formats are those of gguf_families.py and
    gguf_blocks.py. Raises FedGPTError, naming file and reason, for all else and for damage.
    """
    file = read_gguf_file(path)
    family, sizes = family_of(file)
    tensors = {
        family.theirs(name): StoredTensor(
            name, family.their_shape(name, tensor.shape), tensor.form.name
        )
        for name, tensor in file.tensors.items()
    }
    return GGUFModel(file, family, sizes, config_of(file, family, sizes), tensors)
