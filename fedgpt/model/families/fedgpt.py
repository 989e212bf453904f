"""Our own format, for options that no family of transformers computes: every option by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from types import NoneType
from typing import Any

from fedgpt.core.options import ModelOptions
from fedgpt.core.options.option import described
from fedgpt.model.families.base import Family, value

# options that are not in config.json: what is trained changes no output, and vocab_size is there
# as the number of rows
APART = {"trainable", "vocab_size"}
# options of the first version of this format, which every config.json must have
FIRST = {
    *("n_layer", "n_head", "n_embd", "block_size", "dropout", "positions", "norm", "bias", "gelu"),
    "tie",
}


class FedGPT(Family):
    """`model_type: fedgpt`."""

    def fits(self, options: ModelOptions) -> bool:
        """Any options."""
        return True

    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """Every model option by name."""
        ours = {name: value for name, value in asdict(options).items() if name not in APART}
        return {"model_type": "fedgpt", "architectures": ["GPT"], "vocab_size": vocab_size} | ours

    def options(self, config: Mapping[str, Any]) -> ModelOptions:
        """The options by name; those of later versions may be missing."""
        found = {}
        for one in described(ModelOptions):
            missing = one.name not in config and one.name not in FIRST
            if one.name in APART or missing:
                continue
            null = config.get(one.name) is None and NoneType in one.kinds
            found[one.name] = None if null else value(config, one.name, one.kinds[0])
        return ModelOptions(**found)


FAMILY = FedGPT()
