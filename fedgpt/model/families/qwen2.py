"""Qwen2 and Qwen2.5: a Llama in which queries, keys and values alone have biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fedgpt.core.options import ModelOptions
from fedgpt.model.families.base import check_fixed
from fedgpt.model.families.llama import Llama

# settings that change what the model computes, with the one value that our model computes
FIXED = {"use_sliding_window": False}
# what transformers assumes for a name that config.json does not have
DEFAULTS = {"num_key_value_heads": 32}
# these names mean nothing in this family
FOREIGN = ("attention_bias", "mlp_bias")


class Qwen2(Llama):
    """`model_type: qwen2`."""

    kind: ClassVar[str] = "qwen2"
    architecture: ClassVar[str] = "Qwen2ForCausalLM"

    def fits(self, options: ModelOptions) -> bool:
        """As Llama, with biases for queries, keys and values alone."""
        biases = options.has_bias("qkv"), options.bias, options.has_bias("mlp")
        return biases == (True, False, False) and super().fits(replace(options, qkv_bias=False))

    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """config.json for transformers' Qwen2ForCausalLM."""
        config = super().config(options, vocab_size) | FIXED
        return {name: config[name] for name in config if name not in FOREIGN}

    def options(self, config: Mapping[str, Any]) -> ModelOptions:
        """The options of a Qwen2."""
        check_fixed(config, FIXED)
        kinds = config.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"layer_types={kinds!r}: all must be 'full_attention'")
        known = {name: config[name] for name in config if name not in FOREIGN}
        return replace(super().options(DEFAULTS | known), qkv_bias=True)


FAMILY = Qwen2()
