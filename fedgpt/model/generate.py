"""Text from a GPT: greedy or sampled continuations, several at once, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedgpt.core.device import memory
from fedgpt.core.errors import FedGPTError
from fedgpt.model.gpt import GPT, KVCache


def generate(  # noqa: PLR0913  # those of generate in transformers
    model: GPT,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    seed: int = 0,
    cache: bool = True,
) -> list[list[int]]:
    """Continue `prompt_ids`; returns the new tokens of each sample, up to and without `stop`.

    temperature=0 takes the most likely token. `cache=False` computes the complete context again for
    every token; it is slow, and is the reference in tests. Text longer than block_size is cropped
    as `window_start` describes, with and without the cache. Raises ValueError, naming argument and
    value, for values out of range, and FedGPTError if the model's logits are not finite.
    """
    _check_tokens(model, prompt_ids, max_new_tokens, stop)
    _check_sampling(samples, temperature, top_k, top_p)
    _check_memory(model, samples, len(prompt_ids) + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    device = model.lm_head.weight.device
    # (samples, time)
    ids = torch.tensor([list(prompt_ids)] * samples, dtype=torch.int64, device=device)
    ended = torch.zeros(samples, dtype=torch.bool)
    reader = _Reader(model, cache, len(prompt_ids) + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                # on the CPU in fp32 (fp64 stays), so that a seed draws the same on every device
                logits = reader.logits(ids).cpu()  # (samples, vocab)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                if not logits.isfinite().all():
                    raise FedGPTError(
                        "no text can be generated: the model's logits are not finite (NaN or"
                        " infinite), because its weights are damaged or its training diverged;"
                        " lower the learning rate of the training"
                    )
                token = choose(logits, generator, temperature, top_k, top_p)
                ids = torch.cat((ids, token.to(device)[:, None]), 1)
                ended |= token == (-1 if stop is None else stop)
                if bool(ended.all()):
                    break
    finally:
        model.train(was_training)
    new = ids[:, len(prompt_ids) :].tolist()
    return [row[: row.index(stop)] if stop in row else row for row in new]


def window_start(length: int, block_size: int) -> int:
    """Index of the first of `length` tokens in the model's context.

    It moves by a quarter of block_size at a time. Positions in the cache are fixed, so the window
    must be computed again after every move; with moves of one token, that would be every token.
    """
    step = max(1, block_size // 4)
    too_many = max(0, length - block_size)
    return -(-too_many // step) * step  # rounded up


def choose(
    logits: Tensor,
    generator: torch.Generator,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """Draw one token per row: logits (samples, vocab) -> (samples,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        shares = ordered.softmax(-1)
        # total probability of more likely tokens; 0 for the first token, so it is always kept
        before = shares.cumsum(-1) - shares
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class _Reader:
    """Logits of the next token of growing sequences; a cache reads each token once per window."""

    def __init__(self, model: GPT, use_cache: bool, longest: int):
        self.model, self.use_cache = model, use_cache
        self.capacity = min(longest, model.options.block_size)
        self.start, self.cache = 0, None

    def logits(self, ids: Tensor) -> Tensor:
        """ids (samples, time), one token more than in the last call -> (samples, vocab)."""
        start = window_start(ids.size(1), self.model.options.block_size)
        if self.use_cache and (self.cache is None or start != self.start):
            self.start, self.cache = start, KVCache(self.model, ids.size(0), self.capacity)
        unseen = ids[:, start + (self.cache.length if self.cache else 0) :]
        return self.model.lm_head(self.model.hidden(unseen, self.cache)[:, -1])


def _check_tokens(
    model: GPT, prompt_ids: Sequence[int], max_new_tokens: int, stop: int | None
) -> None:
    vocab = model.vocab_size
    if len(prompt_ids) == 0:
        raise ValueError(
            "prompt_ids=[]: needs at least one token; start an empty text with the end-of-text"
            " token"
        )
    wrong = next((i for i in prompt_ids if not 0 <= i < vocab), None)
    if wrong is not None:
        raise ValueError(
            f"prompt_ids has {wrong}: token ids must be from 0 to {vocab - 1}; use the model's"
            " tokenizer"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if stop is not None and not 0 <= stop < vocab:
        raise ValueError(f"stop={stop}: must be a token id from 0 to {vocab - 1}, or None")


def _check_memory(model: GPT, samples: int, longest: int) -> None:
    o = model.options
    cached = 2 * o.n_layer * o.kv_heads * o.width * min(longest, o.block_size)  # keys, values
    needed = samples * (4 * (cached + model.vocab_size) + 8 * longest)  # in float32; ids in int64
    if model.lm_head.weight.device.type == "cpu" and 0 < memory() < needed:
        raise ValueError(
            f"samples={samples}: of up to {longest} tokens need at least {needed / 1e9:,.1f} GB,"
            f" and this machine has {memory() / 1e9:,.1f} GB; generate fewer samples, or fewer"
            " tokens"
        )


def _check_sampling(
    samples: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature={temperature}: must be finite and at least 0 (0 takes the most likely"
            " token)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be above 0 and at most 1, or None for all tokens")
