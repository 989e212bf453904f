"""Options of the group `model`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_least, one_of, option, share


@dataclass
class ModelOptions(Group):
    """The GPT that is trained. The names are those of nanoGPT."""

    group = "model"

    n_layer: int = option(4, "Number of transformer blocks.", allowed=at_least(1, end=10_000))
    n_head: int = option(
        4, "Number of attention heads of a block.", allowed=at_least(1, end=10_000)
    )
    n_embd: int = option(
        128,
        "Width of the model: number of channels of a token's vector. It must be a multiple of"
        " model.n_head.",
        unit="channels",
        allowed=at_least(1, end=10**6),
    )
    block_size: int = option(
        64, "Length of the model's context.", unit="tokens", allowed=at_least(1, end=10**7)
    )
    dropout: float = option(
        0.0,
        "Probability with which an activation is set to zero during training.",
        allowed=share(),
    )
    positions: str = option(
        "rotary",
        "Encoding of token positions: a learned vector for each position (as in GPT-2), or rotary"
        " embeddings.",
        allowed=one_of("learned", "rotary"),
    )
    norm: str = option(
        "layernorm",
        "Normalisation before each layer: layernorm with bias (as in GPT-2), or rmsnorm.",
        allowed=one_of("layernorm", "rmsnorm"),
    )
    bias: bool = option(True, "Whether the linear layers have a bias.")
    gelu: str = option(
        "exact",
        "Form of the GELU activation: exact (with erf), or the approximation with tanh, which"
        " GPT-2 uses.",
        allowed=one_of("exact", "tanh"),
    )
    tie: bool = option(
        True, "Whether the output layer shares its weights with the token embedding."
    )
    trainable: list[str] = option(
        [],
        "Names of the parameters that are trained, with * for any characters, such as"
        " [transformer.h.3.*,lm_head.*]. The other parameters keep their initial values from"
        " init_from or the seed, and are in no job and no update. An empty list means that all"
        " parameters are trained.",
    )

    def rules(self) -> Iterator[str]:
        """The width must be divided among the heads."""
        if self.n_head < 1 or self.n_embd < 1:
            return
        # rotary embeddings turn channels in pairs, so each head needs an even number of them
        unit = 2 * self.n_head if self.positions == "rotary" else self.n_head
        if self.n_embd % unit == 0:
            return
        below, above = self.n_embd // unit * unit, (self.n_embd // unit + 1) * unit
        proposal = f"try {below} or {above}" if below else f"try {above}"
        if self.n_embd % self.n_head == 0:
            yield (
                f"model.n_embd={self.n_embd}: model.positions=rotary needs a multiple of 2 *"
                f" model.n_head={unit}; {proposal}"
            )
        else:
            yield (
                f"model.n_embd={self.n_embd}: must be a multiple of"
                f" model.n_head={self.n_head}; {proposal}"
            )
