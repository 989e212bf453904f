"""GPT-NeoX, the family of Pythia: rotary positions with layer norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedgpt.core.options import ModelOptions
from fedgpt.model.families.base import (
    Family,
    gelu,
    one_rate,
    rope,
    unless,
    value,
    whole,
    with_bias,
)
from fedgpt.model.shape import parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

# what transformers assumes for a name that config.json does not have
DEFAULTS = {
    "use_parallel_residual": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
    "intermediate_size": 24576,
    "layer_norm_eps": 1e-5,
    "attention_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


class GPTNeoX(Family):
    """`model_type: gpt_neox`. Rows of queries, keys and values are grouped by head, and the MLP
    always has biases: a model without them stores zeros.
    """

    names: ClassVar[Mapping[str, str]] = {
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
    skipped: ClassVar[tuple[str, ...]] = (
        ".attention.bias",
        ".attention.masked_bias",
        ".rotary_emb.inv_freq",
    )

    def fits(self, options: ModelOptions) -> bool:
        """Rotary positions and layer norms, with or without biases."""
        return (
            (options.positions, options.norm, options.mlp) == ("rotary", "layernorm", "gelu")
            and len(with_bias(options)) == 1
            and options.kv_heads == options.n_head
            and options.width * options.n_head == options.n_embd
        )

    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """config.json for transformers' GPTNeoXForCausalLM."""
        return {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "vocab_size": vocab_size,
            "max_position_embeddings": options.block_size,
            "hidden_size": options.n_embd,
            "num_hidden_layers": options.n_layer,
            "num_attention_heads": options.n_head,
            "intermediate_size": options.inner,
            "hidden_act": "gelu" if options.gelu == "exact" else "gelu_new",
            "hidden_dropout": options.dropout,
            "attention_dropout": options.dropout,
            "attention_bias": options.bias,
            "layer_norm_eps": options.norm_eps,
            "use_parallel_residual": options.parallel_residual,
            "rotary_pct": options.partial_rotary_factor,
            "rotary_emb_base": options.rope_theta,
            "initializer_range": 0.02,
            "tie_word_embeddings": options.tie,
        }

    def options(self, config: Mapping[str, Any]) -> ModelOptions:
        """The options of a GPT-NeoX."""
        config = rope(
            DEFAULTS | dict(config),
            partial_rotary_factor="rotary_pct",
            rope_theta="rotary_emb_base",
        )
        channels = whole(config, "hidden_size")
        return ModelOptions(
            n_layer=whole(config, "num_hidden_layers"),
            n_head=whole(config, "num_attention_heads"),
            n_embd=channels,
            n_inner=unless(config, "intermediate_size", 4 * channels),
            block_size=whole(config, "max_position_embeddings"),
            dropout=one_rate(config, "hidden_dropout", "attention_dropout"),
            positions="rotary",
            rope_theta=float(value(config, "rotary_emb_base", float)),
            partial_rotary_factor=float(value(config, "rotary_pct", float)),
            parallel_residual=value(config, "use_parallel_residual", bool),
            norm_eps=float(value(config, "layer_norm_eps", float)),
            bias=value(config, "attention_bias", bool),
            gelu=gelu(config, "hidden_act"),
            tie=value(config, "tie_word_embeddings", bool),
        )

    def zeros(self, options: ModelOptions) -> dict[str, tuple[int, ...]]:
        """The biases of the MLP, if our model has none."""
        if options.has_bias("mlp"):
            return {}
        shapes = parameter_shapes(replace(options, mlp_bias=True), vocab_size=1)
        return {name: s for name, s in shapes.items() if ".mlp." in name and len(s) == 1}

    def to_file(self, name: str, p: Tensor, options: ModelOptions) -> tuple[Tensor, ...]:
        """Rows of queries, keys and values are (heads, q k v, width), in our model (q k v, heads,
        width).
        """
        return (_regrouped(p, 3, options.n_head) if ".c_attn." in name else p,)

    def from_file(self, name: str, parts: tuple[Tensor, ...], options: ModelOptions) -> Tensor:
        """The inverse of `to_file`."""
        (p,) = parts
        return _regrouped(p, options.n_head, 3) if ".c_attn." in name else p


def _regrouped(p: Tensor, outer: int, inner: int) -> Tensor:
    """The rows (outer, inner, width) of `p` as (inner, outer, width)."""
    return p.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


FAMILY = GPTNeoX()
