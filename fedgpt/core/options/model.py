"""Options of the group `model`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fedgpt.core.options.option import Group, above, at_least, between, one_of, option, share


@dataclass
class NanoOptions(Group):
    """The part of a model's options that nanoGPT has too, under its names."""

    group = "model"

    n_layer: int = option(4, "Number of transformer blocks.", allowed=at_least(1, end=10_000))
    n_head: int = option(
        4, "Number of attention heads of a block.", allowed=at_least(1, end=10_000)
    )
    n_embd: int = option(
        128,
        "Width of the model: number of channels of a token's vector. It must be a multiple of"
        " model.n_head, unless model.head_dim is set.",
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


@dataclass
class ModelOptions(NanoOptions):
    """The GPT that is trained: as in nanoGPT, and what other families of GPTs do differently."""

    from_init: bool = option(
        False,
        "Whether the model has the shape of the one in init_from; model=hf sets it.",
    )
    vocab_size: int | None = option(
        None,
        "Number of rows of the token embedding, which may be larger than the tokenizer's"
        " vocabulary. null means as many as the tokenizer has tokens.",
        unit="tokens",
        allowed=at_least(1, end=10**7),
    )
    n_kv_head: int | None = option(
        None,
        "Number of key and value heads of a block, each of which serves the same number of"
        " attention heads (grouped-query attention). null means model.n_head.",
        allowed=at_least(1, end=10_000),
    )
    head_dim: int | None = option(
        None,
        "Width of an attention head. null means model.n_embd / model.n_head.",
        unit="channels",
        allowed=at_least(1, end=10**6),
    )
    n_inner: int | None = option(
        None,
        "Width inside the MLP of a block. null means 4 * model.n_embd.",
        unit="channels",
        allowed=at_least(1, end=10**7),
    )
    mlp: str = option(
        "gelu",
        "Kind of the MLP: gelu (as in GPT-2), or swiglu, which has a third layer as a gate (as in"
        " Llama).",
        allowed=one_of("gelu", "swiglu"),
    )
    qkv_bias: bool | None = option(
        None,
        "Whether the layers of queries, keys and values have a bias. null means model.bias.",
    )
    mlp_bias: bool | None = option(
        None, "Whether the layers of the MLP have a bias. null means model.bias."
    )
    norm_eps: float = option(
        1e-5,
        "Number that a norm adds to the variance.",
        allowed=above(0, most=1),
    )
    rope_theta: float = option(
        10_000.0,
        "Base of the angles of rotary positions; with larger values the channels rotate more"
        " slowly.",
        allowed=at_least(1),
    )
    partial_rotary_factor: float = option(
        1.0,
        "Share of the channels of a head that rotary positions rotate.",
        allowed=between(0, 1),
    )
    parallel_residual: bool = option(
        False,
        "Whether attention and MLP of a block both read the input of the block (as in GPT-NeoX), or"
        " the MLP reads the output of the attention.",
    )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def width(self) -> int:
        """Channels of an attention head."""
        # at least 1, so that a wrong number of heads is reported instead of divided by
        return self.n_embd // max(1, self.n_head) if self.head_dim is None else self.head_dim

    @property
    def inner(self) -> int:
        """Channels inside the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def rotated(self) -> int:
        """Channels of a head that rotary positions rotate; 0 with learned positions."""
        rotary = self.positions == "rotary"
        return int(self.width * self.partial_rotary_factor) if rotary else 0

    def rows(self, tokens: int) -> int:
        """Rows of the token embedding, where the tokenizer has `tokens` tokens."""
        return tokens if self.vocab_size is None else self.vocab_size

    def has_bias(self, part: str) -> bool:
        """Whether linear layers have a bias: those of `part` qkv or mlp, or the output layer of the
        attention (any other word).
        """
        own = {"qkv": self.qkv_bias, "mlp": self.mlp_bias}.get(part)
        return self.bias if own is None else own

    def explicit(self) -> ModelOptions:
        """A copy for comparisons: nothing is null, and what has no effect has its default."""
        usual = ModelOptions()
        unused = {name: getattr(usual, name) for name, _ in self.without_effect()}
        return replace(
            self,
            n_kv_head=self.kv_heads,
            head_dim=self.width,
            n_inner=self.inner,
            qkv_bias=self.has_bias("qkv"),
            mlp_bias=self.has_bias("mlp"),
            **unused,
        )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Learned positions are not rotated, and swiglu has another activation."""
        if self.positions == "learned":
            for name in ("rope_theta", "partial_rotary_factor"):
                yield name, "model.positions=learned; add model.positions=rotary"
        if self.mlp == "swiglu":
            yield "gelu", "model.mlp=swiglu; add model.mlp=gelu"

    def rules(self) -> Iterator[str]:
        """The width must be divided among the heads, and the heads among the key and value heads;
        rotary positions rotate channels in pairs.
        """
        counts = (self.n_head, self.n_embd, self.n_kv_head, self.head_dim)
        if any(count is not None and count < 1 for count in counts):
            return  # each is reported as a single value
        if self.n_head % self.kv_heads:
            yield (
                f"model.n_kv_head={self.n_kv_head}: must be a divisor of"
                f" model.n_head={self.n_head}, so that each serves as many heads"
            )
        if self.head_dim is None:
            yield from self._width_problems()
        elif self.positions == "rotary" and self.head_dim % 2:
            yield (
                f"model.head_dim={self.head_dim}: model.positions=rotary needs an even number; try"
                f" {self.head_dim + 1}"
            )
        if self.partial_rotary_factor < 1 and self.positions == "rotary":
            yield from self._share_problems()

    def _width_problems(self) -> Iterator[str]:
        # rotary positions rotate channels in pairs, so each head needs an even number of them
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

    def _share_problems(self) -> Iterator[str]:
        if self.rotated < 2 or self.rotated % 2:
            even = max(2, self.rotated + 1)
            yield (
                f"model.partial_rotary_factor={self.partial_rotary_factor}: rotates"
                f" {self.rotated} of the {self.width} channels of a head, but they rotate in pairs;"
                f" try {even / self.width:g}"
            )
