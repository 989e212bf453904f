"""Tokenizers of pretrained models: the same ids and texts as with transformers."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizer_families import CHINESE, FAMILIES

from fedgpt.data import tokenizer as module
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
every = pytest.mark.parametrize("name", list(FAMILIES))
ROOT: list[Any] = []

PARTS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<tool_call>", ">>TITLE<<"),
    *("<|padding|>", "<file_3>", "<|", "|>", "in the", " class", "don't", "I'LL", "3141", " 26"),
    *("  ", " " * 30, "\n", "\n\n\n", "\r\n", "\t", "山下", "灯笼", "\uff21", "e\u0301", "\xe9"),
    *("q\u0323\u0307", "\u0344", "각", "\u1112\u1161\u11ab", "\U0001f469\u200d\U0001f469"),
    *("\u00a0", "\u0004", "\x1d", "\U0009abcd", "Ġ"),
]
any_text = st.lists(st.sampled_from(PARTS) | st.text(max_size=5), max_size=12).map("".join)


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory):
    ROOT[:] = [tmp_path_factory.mktemp("families")]
    for name in FAMILIES:  # before hypothesis counts the time of an example
        theirs(name)


@cache
def ours(name: str) -> Tokenizer:
    return load_tokenizer(FAMILIES[name].write(ROOT[0] / name))


@cache
def theirs(name: str) -> Any:
    ours(name)
    return transformers.AutoTokenizer.from_pretrained(ROOT[0] / name)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    how = {"split_special_tokens": True, "add_special_tokens": False}
    return tokenizer(text, **how)["input_ids"]


@every
@given(text=any_text)
def test_ids_are_those_of_transformers(name, text):
    tokenizer = ours(name)
    ids = tokenizer.encode(text).tolist()
    assert ids == ids_of(theirs(name), text)
    assert not set(ids) & set(tokenizer.specials.values())


@every
@given(text=any_text)
def test_a_text_comes_back_and_its_bytes_add_up(name, text):
    tokenizer, kept = ours(name), text
    if FAMILIES[name].normalizer:
        kept = unicodedata.normalize("NFC", text)
    kept = kept.encode().translate(None, tokenizer.lost)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == kept.decode(errors="replace")
    assert tokenizer.token_bytes[ids].sum() == len(kept)


@every
@given(data=st.data())
def test_any_ids_are_decoded_as_transformers_does(name, data):
    tokenizer = ours(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    assert tokenizer.decode(ids) == theirs(name).decode(ids, **how)


@every
def test_the_end_and_the_special_tokens_are_those_of_transformers(name):
    tokenizer, reference = ours(name), theirs(name)
    backend = reference.backend_tokenizer.get_added_tokens_decoder()
    assert tokenizer.specials == {t.content: n for n, t in backend.items() if t.special}
    told = reference.eos_token_id
    assert tokenizer.end == (tokenizer.specials["<|endoftext|>"] if told is None else told)
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.token_bytes[[*tokenizer.specials.values()]] == 0).all()
    others = np.delete(tokenizer.token_bytes, [*tokenizer.specials.values()])
    assert (others > 0).all()


@every
def test_a_long_text_has_the_ids_of_the_whole(name, monkeypatch):
    text = f"{CHINESE} don't  12 345 {'.' * 9}\n\n x <|im_end|> é\u0301 \n" * 40
    whole = ids_of(theirs(name), text)
    for size in (1, 7, 4096):
        monkeypatch.setattr(module, "PIECE", size)
        assert ours(name).encode(text).tolist() == whole


def test_only_texts_of_patterns_that_are_known_are_cut():
    divided = {name for name in FAMILIES if ours(name)._vocabulary.divides_before_spaces}
    assert divided == {"gpt2", "smollm"}
