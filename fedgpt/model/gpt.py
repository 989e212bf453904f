"""A GPT as in nanoGPT: pre-norm blocks of causal attention and MLP, learned or rotary positions.

Its options also describe GPT-NeoX, Llama and Qwen2: a few heads of keys and values for all heads of
queries, a gated MLP, and what else ModelOptions names.

GPT.hidden has the complete model in a dozen lines. Tokens become vectors (one row of an embedding
each), the vectors pass through the blocks, which add to them, and the head turns the last ones into
a score for every token that could come next.

Parameter names follow GPT-2, so that export (hf.py) is a rename and a transposition. Exact
per-example gradients (differential privacy; Opacus' hooks and local/bookkeeping.py) need three
properties: no buffers and no parameters on the root module, norms that are torch's own modules, and
position indices with a batch dimension.

Shapes in comments: batch, time (tokens), channels (n_embd), heads (of queries), kv_heads (of keys
and values), width (of a head), vocab.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions
from fedgpt.model.kernels import IGNORE, RowwiseCrossEntropy, attend_explicitly
from fedgpt.model.shape import qkv_sizes, trainable_problems

# longest context (tokens) of the explicit attention, which stores time x time scores
EXPLICIT_UP_TO = 512


class KVCache:
    """Keys and values of the tokens seen so far, allocated for `capacity` tokens at once.

    Generation adds one token at a time. The keys and values of earlier tokens do not change, so
    that each step computes those of the new token only.
    """

    def __init__(self, model: GPT, batch: int, capacity: int):
        options, weight = model.options, model.lm_head.weight
        # keys and values: (2, layers, batch, kv_heads, capacity, width)
        shape = (2, options.n_layer, batch, options.kv_heads, capacity, options.width)
        self.keys, self.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # tokens stored; the model increases it after all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; returns all: (batch, kv_heads, seen, width)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention: every token attends to itself and earlier tokens."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.width, self.dropout = options.width, options.dropout
        self.heads = [size // options.width for size in qkv_sizes(options)]
        # queries, keys and values of all heads from one matrix: one large product is faster
        self.c_attn = nn.Linear(
            options.n_embd, sum(qkv_sizes(options)), bias=options.has_bias("qkv")
        )
        self.c_proj = nn.Linear(options.n_head * options.width, options.n_embd, bias=options.bias)

    def forward(
        self, x: Tensor, layer: int, turn: Rotation | None, cache: KVCache | None
    ) -> Tensor:
        """(batch, time, channels) -> the same.

        `turn` contains the angles of rotary positions, `cache` the tokens before `x`.
        """
        batch, time, _ = x.shape
        # Split before transposing: the backward pass then writes the three gradients into place
        # with one copy.
        qkv = self.c_attn(x).view(batch, time, -1, self.width).split(self.heads, 2)
        # (batch, heads, time, width), for keys and values kv_heads
        q, k, v = (part.transpose(1, 2) for part in qkv)
        if turn is not None:
            # values are not rotated, because positions only affect the attention weights
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        # concatenate the heads and apply the output projection
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """Two linear layers around an activation, applied to each token.

    The activation is a GELU, or with `swiglu` the product with a third layer, the gate, after its
    SiLU (Shazeer 2020, arXiv 2002.05202).
    """

    def __init__(self, options: ModelOptions):
        super().__init__()
        channels, inner, bias = options.n_embd, options.inner, options.has_bias("mlp")
        self.c_fc = nn.Linear(channels, inner, bias=bias)
        self.c_proj = nn.Linear(inner, channels, bias=bias)
        self.c_gate = nn.Linear(channels, inner, bias=bias) if options.mlp == "swiglu" else None
        self.approximate = "tanh" if options.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, channels) -> the same."""
        if self.c_gate is not None:
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """One layer: attention combines tokens, the MLP is applied to each token."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.ln_1 = make_norm(options)
        self.attn = Attention(options)
        self.ln_2 = make_norm(options)
        self.mlp = MLP(options)
        self.dropout = nn.Dropout(options.dropout)
        self.parallel = options.parallel_residual

    def forward(
        self, x: Tensor, layer: int, turn: Rotation | None, cache: KVCache | None
    ) -> Tensor:
        """(batch, time, channels) -> the same."""
        # Both halves add to x. The sum over all layers is the residual stream, through which the
        # gradient reaches the first layer undiminished.
        read = x + self.dropout(self.attn(self.ln_1(x), layer, turn, cache))
        written = self.dropout(self.mlp(self.ln_2(x if self.parallel else read)))
        return read + written


class GPT(nn.Module):
    """Token ids in, logits of the next token out; raises ConfigError for options that do not fit.

    A run's model comes from build.py, which also freezes what `model.trainable` leaves out.
    """

    def __init__(self, options: ModelOptions, vocab_size: int):
        super().__init__()
        problems = [*options.problems(), *trainable_problems(options)]
        if vocab_size > options.rows(vocab_size):
            problems.append(
                f"model.vocab_size={options.vocab_size}: the tokenizer has {vocab_size} tokens; set"
                f" model.vocab_size={vocab_size} or larger, or leave it out"
            )
        if problems:
            raise ConfigError(problems)
        vocab_size = options.rows(vocab_size)
        self.options, self.vocab_size = replace(options), vocab_size
        channels = options.n_embd
        # Without memory ("meta") and without global random numbers: init_weights below fills in
        # the values.
        with torch.device("meta"):
            wte = nn.Embedding(vocab_size, channels)
            modules: dict[str, nn.Module] = {"wte": wte}
            if options.positions == "learned":
                modules["wpe"] = nn.Embedding(options.block_size, channels)
            modules["h"] = nn.ModuleList(Block(options) for _ in range(options.n_layer))
            modules["ln_f"] = make_norm(options)
            self.transformer = nn.ModuleDict(modules)
            self.lm_head = nn.Linear(channels, vocab_size, bias=False)
        self.dropout = nn.Dropout(options.dropout)
        self.to_empty(device="cpu")
        if options.tie:
            # One matrix for the embedding and the output layer: in a small model it is a large
            # part of all parameters.
            self.lm_head.weight = wte.weight
        self.init_weights(seed=0)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every next token: ids (batch, time) int64 -> (batch, time, vocab)."""
        return self.lm_head(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar.

        ids and targets are (batch, time); a target of -100 does not count.
        """
        return cross_entropy(self(ids), targets)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """The input of the head: ids (batch, time) -> (batch, time, channels).

        With a cache, `ids` continue the tokens in it and are added to it. Raises ValueError beyond
        block_size.
        """
        batch, time = ids.shape
        start = 0 if cache is None else cache.length
        if start + time > self.options.block_size:
            raise ValueError(
                f"{start + time} tokens do not fit model.block_size={self.options.block_size}; crop"
                " them"
            )
        positions = torch.arange(start, start + time, device=ids.device)
        x = self.transformer["wte"](ids)  # (batch, time, channels)
        turn = None
        if self.options.positions == "learned":
            # One row of positions per example, by repeat. With a single row for all examples,
            # Opacus would add up their gradients without an error.
            x = x + self.transformer["wpe"](positions.repeat(batch, 1))
        else:
            turn = rotation(positions, self.options, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, turn, cache)
        if cache is not None:
            cache.length += time
        return self.transformer["ln_f"](x)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        blocks = self.transformer["h"]
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """GPT-2's initial weights, a function of `seed` alone.

        Matrices are N(0, 0.02), biases 0, norms 1. Each block adds two projections to the residual
        stream; they start smaller in deeper models, so that the stream's variance does not grow
        with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:  # norms
                p.fill_(1.0)
            else:
                residual = name.endswith("c_proj.weight")
                std = 0.02 / math.sqrt(2 * self.options.n_layer) if residual else 0.02
                # drawn on the CPU: the same numbers on every device
                p.copy_(torch.empty(p.shape, device="cpu").normal_(0.0, std, generator=generator))


def make_norm(options: ModelOptions) -> nn.Module:
    """The norm that `model.norm` names, as torch's own module, for which Opacus has a rule."""
    # always named: torch's own default for RMSNorm depends on the dtype and is 8e-3 in bf16
    kind = nn.RMSNorm if options.norm == "rmsnorm" else nn.LayerNorm
    return kind(options.n_embd, eps=options.norm_eps)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention: q (batch, heads, new, width), k and v (batch, kv_heads, seen, width) -> as
    q.

    The `new` queries belong to the last of the `seen` tokens. Consecutive heads share one head of
    keys and values (Ainslie et al. 2023, arXiv 2305.13245).
    """
    new, seen = q.size(2), k.size(2)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and seen <= EXPLICIT_UP_TO:
        return attend_explicitly(q, k, v, dropout)
    shared = q.size(1) != k.size(1)
    if new == seen:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=shared
        )
    # is_causal aligns its triangle with the first key, which is wrong if there are tokens before
    # the first query. A single query sees every key and needs no mask.
    mask = None
    if new > 1:
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril_(seen - new)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=shared
    )


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (time, rotated channels / 2)


def rotation(positions: Tensor, options: ModelOptions, dtype: torch.dtype) -> Rotation:
    """Angles of rotary positions (Su et al. 2021, arXiv 2104.09864).

    Channel pair i turns by position * rope_theta ** (-2 i / rotated channels). The product of a
    query and a key then depends on the distance of their positions only.
    """
    exponents = torch.arange(0, options.rotated, 2, device=positions.device) / options.rotated
    # (time, rotated channels / 2), float32 whatever the model's dtype
    angles = positions[:, None] * options.rope_theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn channel pairs (i, i + half) of x (batch, heads, time, width) by the angles, where half
    is the number of angles; the channels after the pairs stay as they are.
    """
    cos, sin = turn
    half = cos.size(-1)
    a, b, rest = x.tensor_split((half, 2 * half), -1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat((*turned, rest) if rest.size(-1) else turned, -1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits (..., vocab), targets (...) int64 -> float32 scalar.

    A target of -100 does not count. float64 logits give a float64 scalar.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()  # (rows, vocab), (rows)
    if logits.requires_grad and logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        loss = RowwiseCrossEntropy.apply(logits, targets)
        assert isinstance(loss, Tensor)
        return loss
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=IGNORE)
