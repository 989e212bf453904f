"""Options of the group `tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, at_most, choice, option


@dataclass
class TokenizerOptions(Group):
    """Conversion of text to tokens."""

    group = "tokenizer"

    name: str = choice("bpe", "bytes", "hf")
    vocab_size: int = option(
        4096,
        "Size of the vocabulary, without the end-of-text token: the 256 bytes and the merges"
        " learned from the public part of the corpus.",
        unit="tokens",
        allowed=at_most(1_000_000),
        only_with=("bpe",),
    )
    path: str | None = option(
        None,
        "Folder of a Hugging Face tokenizer, a byte-level BPE, or of a finished run; or a GGUF"
        " file. It is taken as it is, and the public part trains none. model=hf sets it.",
        only_with=("hf",),
    )

    def rules(self) -> Iterator[str]:
        """Every byte needs an entry of the vocabulary, and a folder must be named."""
        if self.name == "bpe" and self.vocab_size < 256:
            yield (
                f"tokenizer.vocab_size={self.vocab_size}: bpe needs 256 entries for the bytes; use"
                " 256 or more"
            )
        if self.name == "hf" and self.path is None:
            yield (
                "tokenizer.path is not set: tokenizer=hf needs the folder of a Hugging Face"
                " tokenizer; set tokenizer.path=FOLDER"
            )
