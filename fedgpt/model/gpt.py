"""A GPT as in nanoGPT: pre-norm blocks of causal attention and MLP, learned or rotary positions.

GPT.hidden has the complete model in a dozen lines. Tokens become vectors (one row of an embedding
each), the vectors pass through the blocks, which add to them, and the head turns the last ones into
a score for every token that could come next.

Parameter names follow GPT-2, so that export (hf.py) is a rename and a transposition. Exact
per-example gradients (differential privacy; Opacus' hooks and local/bookkeeping.py) need three
properties: no buffers and no parameters on the root module, norms that are torch's own modules, and
position indices with a batch dimension.

Shapes in comments: batch, time (tokens), channels (n_embd), heads, width (channels / heads), vocab.
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
from fedgpt.model.shape import NORM_EPS, ROTARY_BASE, trainable_problems

# longest context (tokens) of the explicit attention, which stores time x time scores
EXPLICIT_UP_TO = 512


class KVCache:
    """Keys and values of the tokens seen so far, allocated for `capacity` tokens at once.

    Generation adds one token at a time. The keys and values of earlier tokens do not change, so
    that each step computes those of the new token only.
    """

    def __init__(self, model: GPT, batch: int, capacity: int):
        options, weight = model.options, model.lm_head.weight
        width = options.n_embd // options.n_head
        # keys and values: (2, layers, batch, heads, capacity, width)
        shape = (2, options.n_layer, batch, options.n_head, capacity, width)
        self.keys, self.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # tokens stored; the model increases it after all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; returns all: (batch, heads, seen, width)."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention: every token attends to itself and earlier tokens."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.heads, self.dropout = options.n_head, options.dropout
        # queries, keys and values of all heads from one matrix: one large product is faster
        self.c_attn = nn.Linear(options.n_embd, 3 * options.n_embd, bias=options.bias)
        self.c_proj = nn.Linear(options.n_embd, options.n_embd, bias=options.bias)

    def forward(
        self, x: Tensor, layer: int, turn: Rotation | None, cache: KVCache | None
    ) -> Tensor:
        """(batch, time, channels) -> the same.

        `turn` contains the angles of rotary positions, `cache` the tokens before `x`.
        """
        batch, time, channels = x.shape
        # Unbind before transposing: the backward pass then writes the three gradients into place
        # with one copy.
        qkv = self.c_attn(x).view(batch, time, 3, self.heads, channels // self.heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # (batch, heads, time, width)
        if turn is not None:
            # values are not rotated, because positions only affect the attention weights
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        # concatenate the heads and apply the output projection
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, channels))


class MLP(nn.Module):
    """Two linear layers around a GELU, with four times the width inside; applied to each token."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.c_fc = nn.Linear(options.n_embd, 4 * options.n_embd, bias=options.bias)
        self.c_proj = nn.Linear(4 * options.n_embd, options.n_embd, bias=options.bias)
        self.approximate = "tanh" if options.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, channels) -> the same."""
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

    def forward(
        self, x: Tensor, layer: int, turn: Rotation | None, cache: KVCache | None
    ) -> Tensor:
        """(batch, time, channels) -> the same."""
        # Both halves add to x. The sum over all layers is the residual stream, through which the
        # gradient reaches the first layer undiminished.
        x = x + self.dropout(self.attn(self.ln_1(x), layer, turn, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Token ids in, logits of the next token out; raises ConfigError for options that do not fit.

    A run's model comes from build.py, which also freezes what `model.trainable` leaves out.
    """

    def __init__(self, options: ModelOptions, vocab_size: int):
        super().__init__()
        if problems := [*options.problems(), *trainable_problems(options)]:
            raise ConfigError(problems)
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
            turn = rotation(positions, self.options.n_embd // self.options.n_head, x.dtype)
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
    if options.norm == "rmsnorm":
        return nn.RMSNorm(options.n_embd, eps=NORM_EPS)
    return nn.LayerNorm(options.n_embd, eps=NORM_EPS)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention: q (batch, heads, new, width), k and v (batch, heads, seen, width) -> as q.

    The `new` queries belong to the last of the `seen` tokens.
    """
    new, seen = q.size(2), k.size(2)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and seen <= EXPLICIT_UP_TO:
        return attend_explicitly(q, k, v, dropout)
    if new == seen:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # is_causal aligns its triangle with the first key, which is wrong if there are tokens before
    # the first query. A single query sees every key and needs no mask.
    mask = None
    if new > 1:
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril_(seen - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (time, width / 2)


def rotation(positions: Tensor, width: int, dtype: torch.dtype) -> Rotation:
    """Angles of rotary positions (Su et al. 2021, arXiv 2104.09864).

    Channel pair i turns by position * ROTARY_BASE ** (-2 i / width). The product of a query and a
    key then depends on the distance of their positions only.
    """
    exponents = torch.arange(0, width, 2, device=positions.device) / width
    # (time, width / 2), float32 whatever the model's dtype
    angles = positions[:, None] * ROTARY_BASE**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn channel pairs (i, i + width / 2) of x (batch, heads, time, width) by the angles."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


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
