"""Options of the group `tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, choice, option


@dataclass
class TokenizerOptions(Group):
    """How text becomes tokens."""

    group = "tokenizer"

    name: str = choice("bpe", "bytes")
    vocab_size: int = option(
        4096,
        "Number of entries of the vocabulary, without the token that ends a text: the 256 bytes,"
        " and what is learned from the public part of the corpus.",
        unit="tokens",
        only_with=("bpe",),
    )

    def rules(self) -> Iterator[str]:
        """Every byte has its entry."""
        if self.name == "bpe" and self.vocab_size < 256:
            yield (
                f"tokenizer.vocab_size={self.vocab_size}: bpe needs 256 entries for the bytes; use"
                " 256 or more"
            )
