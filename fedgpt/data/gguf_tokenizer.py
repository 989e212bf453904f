"""The tokenizer in a GGUF file, as the files of a Hugging Face folder.

A GGUF file has tokens, merges and the type of each token, and only the name of the way in which
text is split before the merges (tokenizer.ggml.pre). What is behind these names is in `PIPELINES`:
the pipelines of the tokenizer.json of SmolLM, Qwen2, GPT-2 and Llama 3, which llama.cpp's
src/llama-vocab.cpp follows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedgpt.core.errors import FedGPTError
from fedgpt.core.gguf_file import EMBEDDING, Metadata, read_gguf_file

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
# Hugging Face's names of special tokens -> GGUF's
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_WORDS = BYTES | {"use_regex": True}
# words, then numbers, of at most one or three digits, then punctuation and white space
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Pipeline:
    """What happens to a text before its pieces are merged."""

    steps: tuple[dict[str, Any], ...]  # of the pre-tokenizer
    normalizer: dict[str, str] | None = None
    ignore_merges: bool = False  # a piece that is a token as a whole is not taken apart
    add_bos: bool = False  # where the file does not say


def _split(digits: str) -> tuple[dict[str, Any], ...]:
    pattern = {"Regex": SPLIT.replace("DIGITS", digits)}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, BYTES


PIPELINES = {
    "smollm": Pipeline(({"type": "Digits", "individual_digits": True}, GPT2_WORDS)),
    "qwen2": Pipeline(_split(""), normalizer={"type": "NFC"}),
    "gpt-2": Pipeline((GPT2_WORDS,)),
    "llama-bpe": Pipeline(_split("{1,3}"), ignore_merges=True, add_bos=True),
}


def read_gguf_tokenizer(path: str | Path) -> dict[str, str]:
    """The content of tokenizer.json and tokenizer_config.json, by these names.

    Control tokens become special added tokens, user-defined ones added tokens; unused ones (rows
    that pad the embedding) are in no Hugging Face file. Raises FedGPTError for another kind of
    tokenizer, and for an unknown name in tokenizer.ggml.pre.
    """
    file = read_gguf_file(path)
    said = file.metadata
    if EMBEDDING not in file.tensors:
        raise FedGPTError(f"{path}: the tensor {EMBEDDING} is missing")
    vocab = file.tensors[EMBEDDING].shape[0]
    context = said.value(f"{said.value('general.architecture', str)}.context_length", int)
    pipeline = _pipeline(said)
    tokens, types = _tokens(said, vocab)
    named = said.special_ids(vocab)
    special = {*named.values(), *(n for n, kind in enumerate(types) if kind == CONTROL)}
    added = sorted(special.union(n for n, kind in enumerate(types) if kind == USER_DEFINED))
    vocabulary = {
        token: number
        for number, token in enumerate(tokens)
        if types[number] != UNUSED or number in special
    }
    steps = list(pipeline.steps)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(n, tokens[n], n in special) for n in added],
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": (
            steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        ),
        "post_processor": None,
        "decoder": GPT2_WORDS,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pipeline.ignore_merges,
            "vocab": vocabulary,
            "merges": _merges(said, vocabulary),
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[n] for name, n in named.items()},
        "add_bos_token": said.value("tokenizer.ggml.add_bos_token", bool, pipeline.add_bos),
        "add_eos_token": said.value("tokenizer.ggml.add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if template := said.value("tokenizer.chat_template", str, ""):
        settings["chat_template"] = template
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }


def _pipeline(said: Metadata) -> Pipeline:
    kind = said.value("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise FedGPTError(
            f"{said.path}: tokenizer.ggml.model={kind!r:.60} is not supported; allowed is 'gpt2',"
            " which is byte-level BPE"
        )
    name = said.value("tokenizer.ggml.pre", str)
    if name not in PIPELINES:
        *others, last = PIPELINES
        raise FedGPTError(
            f"{said.path}: tokenizer.ggml.pre={name!r:.60} is not supported; allowed are"
            f" {', '.join(others)} and {last}"
        )
    if said.value("tokenizer.ggml.add_space_prefix", bool, False):
        raise FedGPTError(f"{said.path}: tokenizer.ggml.add_space_prefix=true is not supported")
    return PIPELINES[name]


def _tokens(said: Metadata, vocab: int) -> tuple[list[str], list[int]]:
    """Tokens and their types, one for each row of the embedding."""
    tokens = said.value("tokenizer.ggml.tokens", list)
    types = said.value("tokenizer.ggml.token_type", np.ndarray).tolist()
    if not len(tokens) == len(types) == vocab:
        raise FedGPTError(
            f"{said.path}: tokenizer.ggml.tokens has {len(tokens):,} tokens and"
            f" tokenizer.ggml.token_type {len(types):,} types; must be {vocab:,} as the embedding"
        )
    if others := set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise FedGPTError(
            f"{said.path}: tokenizer.ggml.token_type has {min(others)}; allowed in byte-level BPE"
            " are 1 (normal), 3 (control), 4 (user defined) and 5 (unused)"
        )
    if len(set(tokens)) < len(tokens):
        (twice, _), *_ = Counter(tokens).most_common(1)
        raise FedGPTError(f"{said.path}: the token {twice!r:.60} stands twice in it")
    return tokens, types


def _merges(said: Metadata, vocabulary: dict[str, int]) -> list[Sequence[str]]:
    """The merges as pairs of tokens; each pair and its concatenation are in the vocabulary."""
    pairs = [merge.split(" ") for merge in said.value("tokenizer.ggml.merges", list)]
    for pair in pairs:
        if len(pair) != 2 or not vocabulary.keys() >= {*pair, "".join(pair)}:
            raise FedGPTError(
                f"{said.path}: the merge {' '.join(pair)!r:.60} is not of two tokens to a third"
            )
    return pairs


def _added(number: int, token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": special}
