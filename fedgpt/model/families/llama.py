"""Llama, the family of SmolLM2 and TinyLlama: RMSNorm, gated MLP, rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedgpt.core.options import ModelOptions
from fedgpt.model.families.base import Family, check_fixed, rope, unless, value, whole
from fedgpt.model.shape import qkv_sizes

if TYPE_CHECKING:
    from torch import Tensor

# settings that change what the model computes, with the one value that our model computes
FIXED = {"hidden_act": "silu"}
# what transformers assumes for a name that config.json does not have
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


class Llama(Family):
    """`model_type: llama`. Queries, keys and values are three matrices."""

    kind: ClassVar[str] = "llama"
    architecture: ClassVar[str] = "LlamaForCausalLM"
    names: ClassVar[Mapping[str, str]] = {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.h.": "model.layers.",
        "transformer.ln_f.": "model.norm.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".attn.c_proj.": ".self_attn.o_proj.",
        ".mlp.c_fc.": ".mlp.up_proj.",
        ".mlp.c_gate.": ".mlp.gate_proj.",
        ".mlp.c_proj.": ".mlp.down_proj.",
    }
    skipped: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)

    def fits(self, options: ModelOptions) -> bool:
        """Rotary positions, RMSNorm and a gated MLP; the attention has biases everywhere or
        nowhere.
        """
        return (
            (options.positions, options.norm, options.mlp) == ("rotary", "rmsnorm", "swiglu")
            and options.has_bias("qkv") == options.bias
            and options.partial_rotary_factor == 1
            and not options.parallel_residual
            # transformers demands this, even where head_dim is given
            and options.n_embd % options.n_head == 0
        )

    def config(self, options: ModelOptions, vocab_size: int) -> dict[str, Any]:
        """config.json for transformers' model of this family."""
        return {
            "model_type": self.kind,
            "architectures": [self.architecture],
            "vocab_size": vocab_size,
            "max_position_embeddings": options.block_size,
            "hidden_size": options.n_embd,
            "num_hidden_layers": options.n_layer,
            "num_attention_heads": options.n_head,
            "num_key_value_heads": options.kv_heads,
            "head_dim": options.width,
            "intermediate_size": options.inner,
            "hidden_act": "silu",
            "attention_dropout": options.dropout,
            "attention_bias": options.bias,
            "mlp_bias": options.has_bias("mlp"),
            "rms_norm_eps": options.norm_eps,
            "rope_theta": options.rope_theta,
            "initializer_range": 0.02,
            "tie_word_embeddings": options.tie,
        }

    def options(self, config: Mapping[str, Any]) -> ModelOptions:
        """The options of a Llama."""
        config = rope(DEFAULTS | dict(config))
        check_fixed(config, FIXED)
        channels, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
        bias, mlp_bias = (value(config, f"{part}_bias", bool) for part in ("attention", "mlp"))
        return ModelOptions(
            n_layer=whole(config, "num_hidden_layers"),
            n_head=heads,
            n_kv_head=unless(config, "num_key_value_heads", heads),
            head_dim=unless(config, "head_dim", channels // heads),
            n_embd=channels,
            n_inner=unless(config, "intermediate_size", 4 * channels),
            block_size=whole(config, "max_position_embeddings"),
            dropout=float(value(config, "attention_dropout", float)),
            positions="rotary",
            rope_theta=float(value(config, "rope_theta", float)),
            norm="rmsnorm",
            norm_eps=float(value(config, "rms_norm_eps", float)),
            mlp="swiglu",
            bias=bias,
            mlp_bias=None if mlp_bias == bias else mlp_bias,
            tie=value(config, "tie_word_embeddings", bool),
        )

    def theirs(self, name: str) -> tuple[str, ...]:
        """Three names for the one matrix of queries, keys and values."""
        (name,) = super().theirs(name)
        if ".attn.c_attn." not in name:
            return (name,)
        return tuple(name.replace(".attn.c_attn.", f".self_attn.{x}_proj.") for x in "qkv")

    def stored_shapes(
        self, name: str, shape: tuple[int, ...], options: ModelOptions
    ) -> tuple[tuple[int, ...], ...]:
        """The shapes of queries, keys and values."""
        if ".c_attn." not in name:
            return (shape,)
        return tuple((rows, *shape[1:]) for rows in qkv_sizes(options))

    def to_file(self, name: str, p: Tensor, options: ModelOptions) -> tuple[Tensor, ...]:
        """Queries, keys and values each on their own."""
        return p.split(qkv_sizes(options)) if ".c_attn." in name else (p,)

    def from_file(self, name: str, parts: tuple[Tensor, ...], options: ModelOptions) -> Tensor:
        """The inverse of `to_file`."""
        import torch

        return torch.cat(parts)


FAMILY = Llama()
