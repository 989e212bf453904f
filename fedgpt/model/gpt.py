"""A GPT in the nanoGPT sense: pre-norm blocks of causal attention and MLP, learned or rotary
positions.

Parameter names follow GPT-2, so that export (hf.py) is a rename and a transposition. There are no
buffers and no bare parameters on the root, position indices have a batch dimension, norms are
torch's own modules: Opacus' hooks then give exact per-example gradients. Shapes: batch, time,
channels, heads, width = channels / heads.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions

IGNORE = -100  # targets that do not count in the loss
NORM_EPS = 1e-5  # GPT-2's; torch's default for RMSNorm depends on the dtype and is 8e-3 in bf16
ROTARY_BASE = 10_000.0
# rows of logits that RowwiseCrossEntropy takes at once: one megabyte in fp32 at 4,097 tokens
ROWS = 64
# time: the explicit attention stores time x time scores, worth it only for short contexts
EXPLICIT_UP_TO = 512


class KVCache:
    """Keys and values of the tokens seen so far, preallocated for `capacity` tokens of `batch`
    sequences.
    """

    def __init__(self, model: GPT, batch: int, capacity: int):
        options, weight = model.options, model.lm_head.weight
        shape = (
            2,
            options.n_layer,
            batch,
            options.n_head,
            capacity,
            options.n_embd // options.n_head,
        )
        self.keys, self.values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.length = 0  # tokens stored; raised by the model once all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values, return all of them: (batch, heads, seen,
        width).
        """
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.heads, self.dropout = options.n_head, options.dropout
        self.c_attn = nn.Linear(options.n_embd, 3 * options.n_embd, bias=options.bias)
        self.c_proj = nn.Linear(options.n_embd, options.n_embd, bias=options.bias)

    def forward(
        self, x: Tensor, layer: int, turn: Rotation | None, cache: KVCache | None
    ) -> Tensor:
        """(batch, time, channels) -> the same; `turn` holds rotary positions, `cache` the tokens
        before `x`.
        """
        batch, time, channels = x.shape
        # Unbind before transposing: the backward then writes the three gradients into place with
        # one copy.
        qkv = self.c_attn(x).view(batch, time, 3, self.heads, channels // self.heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in qkv)  # (batch, heads, time, width)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(batch, time, channels))


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.c_fc = nn.Linear(options.n_embd, 4 * options.n_embd, bias=options.bias)
        self.c_proj = nn.Linear(4 * options.n_embd, options.n_embd, bias=options.bias)
        self.approximate = "tanh" if options.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, channels) -> the same."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """Norm, attention, norm, MLP, each half added to the residual stream."""

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
        x = x + self.dropout(self.attn(self.ln_1(x), layer, turn, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Token ids in, logits of the next token out; raises ConfigError where the options do not fit
    together.
    """

    def __init__(self, options: ModelOptions, vocab_size: int):
        super().__init__()
        if problems := list(options.problems()):
            raise ConfigError(problems)
        self.options, self.vocab_size = replace(options), vocab_size
        channels = options.n_embd
        # no memory and no global random numbers for values that init_weights replaces
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
            self.lm_head.weight = wte.weight
        self.init_weights(seed=0)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of every next token: ids (batch, time) int64 -> (batch, time, vocab)."""
        return self.lm_head(self.hidden(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, a float32 scalar; targets (batch, time), -100 does
        not count.
        """
        return cross_entropy(self(ids), targets)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the head sees: ids (batch, time) -> (batch, time, channels).

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
            # One row of positions per example, by repeat: Opacus sums over a missing batch
            # dimension without notice.
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
        """GPT-2's start, a function of `seed` alone: N(0, 0.02), projections into the residual
        smaller with depth.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:  # norms
                p.fill_(1.0)
            else:
                std = (
                    0.02 / math.sqrt(2 * self.options.n_layer)
                    if name.endswith("c_proj.weight")
                    else 0.02
                )
                p.copy_(torch.empty(p.shape, device="cpu").normal_(0.0, std, generator=generator))


def make_norm(options: ModelOptions) -> nn.Module:
    """The norm that `model.norm` names; torch's own modules, whose per-example gradients Opacus
    knows.
    """
    if options.norm == "rmsnorm":
        return nn.RMSNorm(options.n_embd, eps=NORM_EPS)
    return nn.LayerNorm(options.n_embd, eps=NORM_EPS)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Causal attention: q (batch, heads, new, width), k and v (batch, heads, seen, width) -> like
    q.

    The `new` queries belong to the last of the `seen` tokens.
    """
    new, seen = q.size(2), k.size(2)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and seen <= EXPLICIT_UP_TO:
        return attend_explicitly(q, k, v, dropout)
    if new == seen:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # is_causal aligns its triangle with the first key, which is wrong once there are tokens before
    # the first query.
    mask = (
        None
        if new == 1
        else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril_(seen - new)
    )
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attend_explicitly(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """What `attend` says, as two batched matmuls: twice as fast as torch's bf16 kernel on a CPU
    with AMX.
    """
    batch, heads, new, width = q.shape
    seen = k.size(2)
    q, k, v = (part.reshape(batch * heads, -1, width) for part in (q, k, v))
    mask = torch.full((new, seen), -math.inf, dtype=q.dtype, device=q.device).triu_(1 + seen - new)
    # (batch * heads, new, seen)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    shares = F.dropout(scores.softmax(-1), dropout)
    return torch.bmm(shares, v).view(batch, heads, new, width)


Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (time, width / 2)


def rotation(positions: Tensor, width: int, dtype: torch.dtype) -> Rotation:
    """Angles of rotary positions (Su et al. 2021): channel pair i turns by position * base ** (-2 i
    / width).
    """
    exponents = torch.arange(0, width, 2, device=positions.device) / width
    # (time, width / 2), float32 whatever the model's dtype
    angles = positions[:, None] * ROTARY_BASE**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn channel pairs (i, i + width / 2) of x (batch, heads, time, width) by their position's
    angles.
    """
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits (..., vocab), targets (...) int64, -100 does not count ->
    float32 scalar.

    float64 logits give a float64 scalar.
    """
    logits, targets = logits.flatten(0, -2), targets.flatten()  # (rows, vocab), (rows)
    if logits.requires_grad and logits.device.type == "cpu" and logits.dtype == torch.bfloat16:
        loss = RowwiseCrossEntropy.apply(logits, targets)
        assert isinstance(loss, Tensor)
        return loss
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=IGNORE)


class RowwiseCrossEntropy(torch.autograd.Function):
    """Cross-entropy of bf16 logits on a CPU, computed in fp32 for a few rows at a time.

    Logits are the largest tensor of a small model, and casting them whole passes over memory some
    ten times. Here a group of rows stays in the cache for loss and gradient alike, 2.7 times as
    fast; for fp32 logits it gains nothing. Not for vmap or second derivatives: torch says so when
    asked for them.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (rows, vocab), targets (rows) -> scalar; the gradient is made on the way and
        kept.
        """
        counts = (targets != IGNORE).float()[:, None]  # (rows, 1)
        weights = counts / counts.sum()
        targets = targets.clamp(min=0)[:, None]
        grad = torch.empty_like(logits)
        losses = torch.empty_like(weights)
        for start in range(0, len(logits), ROWS):
            rows = slice(start, start + ROWS)
            x, target = logits[rows].float(), targets[rows]
            p = x.softmax(-1)
            # log(sum(exp(x))) from the largest entry, whose share never underflows; log_softmax is
            # four times slower
            losses[rows] = x.amax(-1, True) - p.amax(-1, True).log() - x.gather(1, target)
            p.scatter_add_(1, target, p.new_full((), -1.0).expand(target.shape))
            grad[rows] = p.mul_(weights[rows])
        ctx.save_for_backward(grad)
        return (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name ctx
        ctx, *upstream: Tensor
    ) -> tuple[Tensor, None]:
        """The kept gradient, scaled where the loss was; one pass over it costs a tenth of a
        step.
        """
        (grad,) = ctx.saved_tensors
        return grad if upstream[0] == 1 else grad * upstream[0], None
