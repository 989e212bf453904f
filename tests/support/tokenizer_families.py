"""Miniatures of the tokenizers of pretrained models: one small BPE behind each family's pipeline.

Nothing of a real vocabulary is in them, and the regular expressions are their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from fedgpt.data.byte_level import byte_characters

CHINESE = "山下有一条小河,河边住着一位做灯笼的人。每到冬天,他就把灯笼挂满整条街。\n"
WORDS = r" ?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
PUNCTUATION = {"type": "Punctuation", "behavior": "Contiguous"}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


@cache
def trained() -> tuple[list[str], list[list[str]]]:
    """About 1,000 tokens, the bytes among them, and their merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(byte_characters()), show_progress=False
    )
    texts = [topics[name] for name in sorted(topics)[:20]]
    library.train_from_iterator([*texts, CHINESE * 20], trainer)
    model = json.loads(library.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


@dataclass(frozen=True)
class Family:
    """What a family adds to the trained BPE."""

    steps: Sequence[Mapping[str, Any]] = (GPT2,)
    normalizer: str | None = None
    ignore_merges: bool = False
    front: Sequence[str] = ()  # special tokens before the vocabulary, which has them too
    behind: Sequence[str] = ()  # special tokens after it
    ordinary: Sequence[str] = ()  # added tokens that are not special
    without: str = ""  # characters of bytes that no token has
    settings: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""  # of the file chat_template.jinja

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(self.tokenizer()), encoding="utf-8")
        if self.settings:
            (folder / "tokenizer_config.json").write_text(json.dumps(self.settings))
        if self.template:
            (folder / "chat_template.jinja").write_text(self.template)
        return folder

    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        names, merges = trained()
        lost = set(self.without)
        kept = [*self.front, *(name for name in names if not lost & set(name))]
        steps = list(self.steps)
        normalizer = {"type": self.normalizer} if self.normalizer else None
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self._added(len(kept)),
            "normalizer": normalizer,
            "pre_tokenizer": (
                steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
            ),
            "post_processor": None,
            "decoder": GPT2,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.ignore_merges,
                "vocab": {name: number for number, name in enumerate(kept)},
                "merges": [pair for pair in merges if not lost & set("".join(pair))],
            },
        }

    def _added(self, first: int) -> list[dict[str, Any]]:
        special = [(number, name, True) for number, name in enumerate(self.front)]
        behind = [(name, True) for name in self.behind] + [(name, False) for name in self.ordinary]
        special += [(first + number, *each) for number, each in enumerate(behind)]
        flags = {"single_word": False, "lstrip": False, "rstrip": False}
        return [
            {
                "id": number,
                "content": name,
                **flags,
                "normalized": not name.startswith("<"),
                "special": of_model,
            }
            for number, name, of_model in special
        ]


SMOL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<file_{n}>" for n in range(14)))
FAMILIES = {
    "gpt2": Family(behind=["<|endoftext|>"], settings={"model_max_length": 1024}),
    "neox": Family(
        normalizer="NFC",
        front=["<|endoftext|>", "<|padding|>"],
        ordinary=[" " * size for size in range(24, 1, -1)],
        settings={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "smollm": Family(
        steps=(DIGITS, GPT2),
        front=SMOL,
        without="".join(byte_characters()[byte] for byte in (0x04, 0x1D, 0xF1, 0xF2)),
        settings={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "model_max_length": 8192,
        },
        template=CHAT,
    ),
    "qwen": Family(
        steps=(split(WORDS.replace("DIGITS", "")), BYTES),
        normalizer="NFC",
        behind=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ordinary=["<tool_call>", "</tool_call>"],
        settings={
            "bos_token": None,
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT,
            "model_max_length": 131072,
        },
    ),
    "llama": Family(
        steps=(split(WORDS.replace("DIGITS", "{1,3}")), BYTES),
        ignore_merges=True,
        behind=["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
        settings={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    ),
    "falcon": Family(
        steps=(PUNCTUATION, GPT2, {"type": "Digits", "individual_digits": False}),
        behind=[">>TITLE<<", "<|endoftext|>"],
    ),
}
