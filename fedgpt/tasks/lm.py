"""Pre-training, the task of nanoGPT: predict every token from those before it in its window."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from fedgpt.core.score import LANGUAGE, Scoring
from fedgpt.data.batches import IGNORE, Batches, Blocks, windows
from fedgpt.data.examples import Batch, BatchSource, Examples, ExampleSet
from fedgpt.data.text import Text
from fedgpt.tasks.base import Task


@dataclass(frozen=True)
class LanguageModel(Task):
    """All text of a party is one stream of documents, separated by the end token.

    Training uses random windows of the stream, DP-SGD uses blocks that share no token. Evaluation
    cuts the stream into windows, so that every token is predicted once, from at most block_size - 1
    earlier tokens of its window. With more context the loss would be lower.
    """

    scoring: ClassVar[Scoring] = LANGUAGE
    units_are_blocks: ClassVar[bool] = True

    def examples(
        self, tokens: np.ndarray, label: str, block_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The windows of one document alone, without its neighbours in the stream."""
        for start in range(0, len(tokens) - 1, block_size):
            window = tokens[start : start + block_size + 1].astype(np.int64)
            yield window[:-1], window[1:]

    def batches(self, text: Text, block_size: int, batch_size: int, seed: int) -> BatchSource:
        """Random windows."""
        return Batches(text.tokens, block_size, batch_size, seed)

    def units(self, text: Text, block_size: int) -> ExampleSet:
        """Blocks."""
        return Blocks(text.tokens, block_size)

    def held_out(self, text: Text, block_size: int) -> Examples:
        """Windows."""
        return Examples(windows(text.tokens, block_size))

    def tally(self, outputs: Tensor, batch: Batch, token_bytes: Tensor | None) -> dict[str, Tensor]:
        """The sum of the loss in nats, and the bytes of the predicted text."""
        assert token_bytes is not None, "the central evaluation has the tokenizer's table"
        bytes_each = token_bytes[batch[1].clamp(min=0)]
        read = (bytes_each * (batch[1] != IGNORE)).sum()
        return {**super().tally(outputs, batch, token_bytes), "bytes": read}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Loss and perplexity per token, and bits per byte.

        Bits per byte divide by the bytes of the text instead of by tokens, so models with different
        tokenizers can be compared.
        """
        bits = totals["nats"] / math.log(2)
        return {**super().scores(totals), "bits_per_byte": bits / max(totals["bytes"], 1)}
