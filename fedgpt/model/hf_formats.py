"""The families of models that can be read and written as Hugging Face folders.

Options that a family of transformers computes are exported as its `model_type`, so that
transformers loads the folder; all others become `model_type: fedgpt`. Free of torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedgpt.core.options import ModelOptions
from fedgpt.model.families import fedgpt, gpt2, gpt_neox, llama, qwen2
from fedgpt.model.families.base import Family

# model_type -> its family; the first that fits is taken for an export
FAMILIES: Mapping[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "qwen2": qwen2.FAMILY,
    "fedgpt": fedgpt.FAMILY,
}


def family_for(options: ModelOptions) -> Family:
    """The family in which a model with `options` is exported."""
    return next(family for family in FAMILIES.values() if family.fits(options))
