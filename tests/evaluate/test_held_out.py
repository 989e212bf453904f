"""Scores against a slow reference: one window at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.advice import advises
from support.labels_task import TopTokens

from fedgpt.core.device import Compute
from fedgpt.core.errors import FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.core.options import ModelOptions, TokenizerOptions
from fedgpt.data.text import Text
from fedgpt.data.tokenizer import Tokenizer, make_tokenizer
from fedgpt.evaluate.held_out import HeldOut
from fedgpt.evaluate.metrics.accuracy import Accuracy
from fedgpt.evaluate.metrics.base import BatchMetric
from fedgpt.model.gpt import GPT
from fedgpt.tasks.lm import LanguageModel

BLOCK = 8
MODEL = ModelOptions(n_layer=2, n_head=2, n_embd=32, block_size=BLOCK, positions="learned")
FP32 = Compute("cpu", "fp32", "the reference")
TEXT = "The river rose; 河水上涨了, and nobody in the town by the river was surprised. "


def parameters(vocab: int, seed: int = 5, scale: float = 10.0) -> tuple[GPT, np.ndarray]:
    """A model far from uniform, so that a token scored twice or not at all would show."""
    model = GPT(MODEL, vocab).eval()
    model.init_weights(seed)
    vector = flatten(model)[1]
    vector.mul_(scale)
    return model, vector.numpy()


def scorer(tokens, token_bytes, compute: Compute = FP32, limit: int = 0, **about) -> HeldOut:
    """A scorer of the task lm on the tokens of one document."""
    task = LanguageModel()
    examples = task.held_out(Text.of([tokens]), BLOCK).spread(limit)
    return HeldOut(MODEL, examples, token_bytes, compute, task, **about)


def slow_nats(model: GPT, tokens: np.ndarray) -> list[float]:
    """Minus the log probability of tokens[1:], given the earlier ones of the window, in float64."""
    model = model.double()
    nats = []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, BLOCK):
            seen = torch.from_numpy(tokens[start : start + BLOCK].astype(np.int64))[
                : len(tokens) - 1 - start
            ]
            logits = model(seen[None])[0]  # (time, vocab)
            for row, target in zip(logits.tolist(), tokens[start + 1 :], strict=False):
                top = max(row)
                nats.append(
                    top + math.log(math.fsum(math.exp(x - top) for x in row)) - row[int(target)]
                )
    return nats


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request) -> Tokenizer:
    return make_tokenizer(TokenizerOptions(name=request.param, vocab_size=280), [TEXT * 3])


DOCUMENTS = (TEXT + TEXT, TEXT[21:] + TEXT)


@pytest.fixture(scope="module")
def tokens(tokenizer) -> np.ndarray:
    """Two documents, each with its end token, whose last window is partly empty."""
    stream = [token for text in DOCUMENTS for token in (*tokenizer.encode(text), tokenizer.end)]
    assert (len(stream) - 1) % BLOCK
    return np.array(stream, dtype=np.uint16)


def test_the_loss_equals_that_of_a_loop_over_windows_in_float64(tokenizer, tokens):
    model, params = parameters(tokenizer.vocab_size)
    held_out = scorer(tokens, tokenizer.token_bytes)
    scores = held_out(params)
    nats = slow_nats(model, tokens)
    assert len(nats) == len(tokens) - 1 == held_out.tokens
    assert scores["loss"] == pytest.approx(math.fsum(nats) / len(nats), rel=1e-5)
    assert scores["loss"] > 1.2 * math.log(tokenizer.vocab_size), "the model is far from uniform"
    assert scores["perplexity"] == math.exp(scores["loss"])


def test_bits_per_byte_divide_by_the_bytes_of_the_text(tokenizer, tokens):
    model, params = parameters(tokenizer.vocab_size)
    scores = scorer(tokens, tokenizer.token_bytes)(params)
    # only the first token is not predicted
    unpredicted = len(tokenizer.decode(tokens[:1]).encode())
    # end tokens have no bytes
    text_bytes = sum(len(text.encode()) for text in DOCUMENTS) - unpredicted
    bits = math.fsum(slow_nats(model, tokens)) / math.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-5)


def test_bits_per_byte_of_three_bytes_by_hand():
    """Uniform over 257 ids: ab<end> has the targets b and the end, of which only b is a byte."""
    tokenizer = make_tokenizer(TokenizerOptions(name="bytes"), [])
    held_out = scorer(np.array([97, 98, 256]), tokenizer.token_bytes)
    assert held_out.tokens == 2
    scores = held_out(np.zeros(held_out.layout.size, np.float32))
    assert scores["bits_per_byte"] == pytest.approx(2 * math.log2(257), rel=1e-6)


def test_a_uniform_model_needs_log2_of_the_vocabulary_for_every_token(tokenizer, tokens):
    held_out = scorer(tokens, tokenizer.token_bytes)
    scores = held_out(np.zeros(held_out.layout.size, np.float32))
    vocab = tokenizer.vocab_size
    assert scores["loss"] == pytest.approx(math.log(vocab), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(vocab, rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(
        math.log2(vocab) * held_out.tokens / int(tokenizer.token_bytes[predicted(held_out)].sum()),
        rel=1e-6,
    )


def test_metrics_come_from_the_pass_that_gives_the_scores(tokenizer, tokens):
    model, params = parameters(tokenizer.vocab_size)
    held_out = scorer(tokens, tokenizer.token_bytes, metrics=(Accuracy(), TopTokens(k=64)))
    scores = held_out(params)
    plain = scorer(tokens, tokenizer.token_bytes)(params)
    assert plain.items() <= scores.items() and list(scores)[-2:] == ["accuracy", "top_tokens"]
    right = top = 0
    for inputs, targets in zip(*held_out.examples.rows, strict=True):
        for row, target in zip(model(inputs[None])[0], targets.tolist(), strict=True):
            order = row.argsort(descending=True).tolist()
            right += order[0] == target
            top += target in order[:64]
    assert right < top < held_out.tokens
    assert scores["accuracy"] == right / held_out.tokens
    assert scores["top_tokens"] == top / held_out.tokens


def test_batches_do_not_change_the_score(tokenizer, tokens):
    _, params = parameters(tokenizer.vocab_size)
    held_out = scorer(tokens, tokenizer.token_bytes)
    together = held_out(params)
    held_out._batch_size = 3  # a last batch that is smaller and holds the padded window
    assert held_out(params)["loss"] == pytest.approx(together["loss"], rel=1e-6)


def predicted(held_out: HeldOut) -> np.ndarray:
    targets = held_out.examples.rows[1]
    return targets[targets >= 0].numpy()


@given(st.integers(2, 200))
def test_every_token_but_the_first_is_predicted_once(length):
    tokens = np.arange(length)
    held_out = scorer(tokens, np.ones(length, np.int64))
    assert sorted(predicted(held_out)) == list(range(1, length))
    assert held_out.tokens == length - 1


@given(st.integers(2, 400), st.integers(1, 500))
def test_a_limit_spreads_over_the_text_and_is_kept(length, limit):
    tokens = np.arange(length)
    held_out = scorer(tokens, np.ones(length, np.int64), limit=limit)
    seen = predicted(held_out)
    assert len(set(seen)) == len(seen) == held_out.tokens
    if limit >= length:
        assert held_out.tokens == length - 1
        return
    assert held_out.tokens <= max(limit, BLOCK)
    rows = sorted({(int(t) - 1) // BLOCK for t in seen})
    assert len(rows) == max(1, limit // BLOCK)
    if len(rows) > 1:
        gaps = np.diff(rows)
        assert rows[0] == 0 and rows[-1] == (length - 2) // BLOCK and gaps.max() - gaps.min() <= 1


def test_a_score_depends_on_the_given_vector_only(tokenizer, tokens):
    held_out = scorer(tokens, tokenizer.token_bytes)
    a, b = (parameters(tokenizer.vocab_size, seed)[1] for seed in (1, 2))
    first, other = held_out(a), held_out(b)
    kept = a.copy()
    assert held_out(a) == first != other
    np.testing.assert_array_equal(a, kept)


def test_bf16_scores_are_near_those_of_fp32(tokenizer, tokens):
    _, params = parameters(tokenizer.vocab_size, scale=1.0)
    exact = scorer(tokens, tokenizer.token_bytes)(params)
    rough = scorer(tokens, tokenizer.token_bytes, Compute("cpu", "bf16", ""))(params)
    assert rough["loss"] == pytest.approx(exact["loss"], rel=5e-3)


def test_a_very_bad_model_has_infinite_perplexity_and_finite_loss(tokenizer, tokens):
    model, params = parameters(tokenizer.vocab_size, scale=1.0)
    views = dict(model.named_parameters())
    with torch.no_grad():
        views["transformer.ln_f.weight"].mul_(1e6)
    scores = scorer(tokens, tokenizer.token_bytes)(params)
    assert (
        scores["loss"] > 700 and math.isfinite(scores["loss"]) and scores["perplexity"] == math.inf
    )


@dataclass(frozen=True)
class Hungry(BatchMetric):
    """Counts examples, and asks for more memory than there is if a batch has more than `most`."""

    name: ClassVar[str] = "hungry"
    most: int = 5

    def tally(self, outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]):
        if len(outputs) > self.most:
            torch.empty(1 << 46)
        return {"examples": torch.tensor(len(outputs))}

    def value(self, totals: Mapping[str, float]) -> float:
        return totals["examples"]


def test_a_batch_that_does_not_fit_into_memory_is_halved(caplog):
    tokens = np.random.default_rng(0).integers(0, 257, 200 * BLOCK + 1)
    vector = parameters(257)[1]
    expected = scorer(tokens, np.ones(257, np.int64))(vector)
    held_out = scorer(tokens, np.ones(257, np.int64), metrics=[Hungry()])
    before = held_out._batch_size
    found = held_out(vector)
    assert found.pop("hungry") == 200, "every example is scored once"
    assert found == pytest.approx(expected, rel=1e-6)
    assert held_out._batch_size <= 5 < before
    assert caplog.messages[0].startswith(f"{before} held-out examples do not fit into the memory")
    caplog.clear()
    held_out(vector)
    assert not caplog.messages, "later evaluations begin with the smaller size"


def test_an_example_that_does_not_fit_into_memory_is_told_with_what_to_change():
    tokens = np.random.default_rng(0).integers(0, 257, 20 * BLOCK + 1)
    held_out = scorer(tokens, np.ones(257, np.int64), metrics=[Hungry(most=0)])
    with pytest.raises(FedGPTError, match="the evaluation is out of memory") as told:
        held_out(parameters(257)[1])
    advises(told.value, "lower it, or make the model smaller")
