"""GPT-2, whose names are ours; its linear layers store their matrices transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedgpt.core.options import ModelOptions
from fedgpt.model.families.base import (
    Family,
    check_fixed,
    gelu,
    one_rate,
    unless,
    value,
    whole,
    with_bias,
)

# settings that change what the model computes, with the one value that our model computes
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# what transformers assumes for a name that config.json does not have
DEFAULTS = {
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}


class GPT2(Family):
    """`model_type: gpt2`."""

    prefix: ClassVar[str] = "transformer."
    transposed: ClassVar[tuple[str, ...]] = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    skipped: ClassVar[tuple[str, ...]] = (".attn.bias", ".attn.masked_bias")

    def fits(self, options: ModelOptions) -> bool:
        """Learned positions, layer norms and biases everywhere."""
        return (
            (options.positions, options.norm, options.mlp) == ("learned", "layernorm", "gelu")
            and with_bias(options) == {True}
            and options.kv_heads == options.n_head
            and options.width * options.n_head == options.n_embd
            and not options.parallel_residual
        )

    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """config.json for transformers' GPT2LMHeadModel."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": vocab_size,
            "n_positions": options.block_size,
            "n_embd": options.n_embd,
            "n_layer": options.n_layer,
            "n_head": options.n_head,
            "n_inner": None if options.inner == 4 * options.n_embd else options.inner,
            "activation_function": "gelu" if options.gelu == "exact" else "gelu_new",
            "resid_pdrop": options.dropout,
            "embd_pdrop": options.dropout,
            "attn_pdrop": options.dropout,
            "layer_norm_epsilon": options.norm_eps,
            "initializer_range": 0.02,
            "tie_word_embeddings": options.tie,
        } | FIXED

    def options(self, config: Mapping[str, Any]) -> ModelOptions:
        """The options of a GPT-2."""
        config = DEFAULTS | dict(config)
        channels = whole(config, "n_embd")
        check_fixed(config, FIXED)
        return ModelOptions(
            n_layer=whole(config, "n_layer"),
            n_head=whole(config, "n_head"),
            n_embd=channels,
            n_inner=unless(config, "n_inner", 4 * channels),
            block_size=whole(config, "n_positions"),
            dropout=one_rate(config, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
            positions="learned",
            gelu=gelu(config, "activation_function"),
            norm_eps=float(value(config, "layer_norm_epsilon", float)),
            tie=value(config, "tie_word_embeddings", bool),
        )


FAMILY = GPT2()
