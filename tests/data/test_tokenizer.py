import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.advice import advises
from tokenizers import Tokenizer as Library

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import TokenizerOptions
from fedgpt.data import tokenizer as module
from fedgpt.data.byte_level import byte_characters
from fedgpt.data.tokenizer import load_tokenizer, make_tokenizer
from fedgpt.data.tokenizer_files import END

CHINESE = (
    "山下有一条小河。河边住着一位做灯笼的人,他做的灯笼又轻又亮。"
    "\n\n每到冬天,他就把灯笼挂满整条街。\n"
)
ENGLISH = (
    "The lamp maker lives by the river. In winter he hangs lamps along the street,\n    and nobody"
    " is lost.\n\n"
)
TEXTS = [CHINESE * 20, ENGLISH * 60]
BPE = TokenizerOptions(name="bpe", vocab_size=400)
KINDS = {
    "bpe": make_tokenizer(BPE, TEXTS),
    "bytes": make_tokenizer(TokenizerOptions(name="bytes"), []),
}
both = pytest.mark.parametrize("kind", list(KINDS))
# with more spaces, line ends and control characters than in st.text()
any_text = st.text() | st.text(
    alphabet=st.sampled_from(list(" \n\t\r\x1c\x85\u3000ab1!'é雪\U0001f600")), max_size=60
)


@both
@given(text=any_text)
def test_round_trip_is_exact_and_bytes_add_up(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@both
def test_round_trip_of_real_text(kind):
    tokenizer = KINDS[kind]
    for text in (CHINESE, ENGLISH, "", f"a literal {END} is ordinary text"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64 and ids.ndim == 1
        assert tokenizer.end not in ids
        assert tokenizer.decode(ids) == text


@both
def test_the_end_token_is_the_last_id_and_decodes_to_nothing(kind):
    tokenizer = KINDS[kind]
    assert tokenizer.end == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.end] == 0
    assert (tokenizer.token_bytes[:-1] > 0).all()
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.end, *tokenizer.encode("b")]) == "ab"


@both
def test_a_saved_tokenizer_loads_unchanged(kind, tmp_path):
    tokenizer = KINDS[kind]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.name, loaded.digest, loaded.vocab_size) == (
        kind,
        tokenizer.digest,
        tokenizer.vocab_size,
    )
    assert (loaded.encode(CHINESE) == tokenizer.encode(CHINESE)).all()


@both
def test_transformers_reads_the_saved_folder(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = KINDS[kind]
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert theirs.eos_token_id == tokenizer.end and len(theirs) == tokenizer.vocab_size
    for text in (CHINESE, ENGLISH):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text


def test_byte_tokens_are_the_bytes_in_both_implementations(tmp_path):
    tokenizer = KINDS["bytes"]
    tokenizer.save(tmp_path)
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode(CHINESE).tolist() == list(CHINESE.encode())
    assert Library.from_file(str(tmp_path / "tokenizer.json")).encode(CHINESE).ids == list(
        CHINESE.encode()
    )


def test_cutting_into_pieces_changes_no_id(tmp_path, monkeypatch):
    tokenizer = KINDS["bpe"]
    tokenizer.save(tmp_path)
    uncut = Library.from_file(str(tmp_path / "tokenizer.json"))
    texts = ["x  \n\n\n  y\t\n z\n" * 9, " \n \n", *TEXTS, "雪\x1c \n!\x1c\x85 a\u3000\n b" * 5]
    for size in (1, 7, 4096):
        monkeypatch.setattr(module, "PIECE", size)
        assert [ids.tolist() for ids in tokenizer.encode_many(texts)] == [
            uncut.encode(text).ids for text in texts
        ]


def test_training_is_deterministic_and_sees_only_what_it_is_given():
    again = make_tokenizer(BPE, list(TEXTS))
    assert again.digest == KINDS["bpe"].digest
    assert make_tokenizer(BPE, [ENGLISH * 60]).digest != again.digest
    assert again.vocab_size == 401
    assert len(again.encode(ENGLISH)) < len(ENGLISH) / 2


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = make_tokenizer(TokenizerOptions(name="bpe", vocab_size=4096), ["abab cdcd\n"])
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode("雪 abab")) == "雪 abab"


def test_byte_characters_are_those_of_gpt2():
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert (characters[ord("A")], characters[ord(" ")], characters[0]) == ("A", "Ġ", "Ā")


def test_half_a_character_decodes_to_a_replacement():
    assert KINDS["bytes"].decode("雪".encode()[:2]) == "�"


def test_wrong_options_and_files_say_what_to_change(tmp_path):
    assert "did you mean 'bytes'" in next(TokenizerOptions(name="byte").problems())
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size=100.*256 or more"):
        make_tokenizer(TokenizerOptions(vocab_size=100), TEXTS)
    with pytest.raises(ConfigError, match=r"raise corpus\.public or use tokenizer=bytes"):
        make_tokenizer(TokenizerOptions(), [])
    with pytest.raises(FedGPTError, match=re.escape(str(tmp_path))):
        load_tokenizer(tmp_path)
    KINDS["bytes"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    foreign = json.loads(path.read_text())
    foreign["added_tokens"] = []
    path.write_text(json.dumps(foreign))
    with pytest.raises(FedGPTError, match=r"eos_token '<\|endoftext\|>' is not in the"):
        load_tokenizer(tmp_path)


def without(vocabulary, gone):
    """The vocabulary without one token; the ids after it are one lower."""
    return {
        name: number - (number > vocabulary[gone])
        for name, number in vocabulary.items()
        if name != gone
    }


def renumbered(vocabulary, first):
    """The ids from `first` on are one higher: one id has no token."""
    return {name: number + (number >= first) for name, number in vocabulary.items()}


CHANGED = {
    "a negative id": (lambda v: {**v, "A": -1}, 400, "invalid value"),
    "an id that no vocabulary has": (lambda v: {**v, "A": 10**9}, 400, "is not a number from 0"),
    "an end token with two ids": (lambda v: {**v, END: 7}, 400, "has the id 400, and must be 7"),
    "two tokens with one id": (lambda v: {**v, max(v, key=v.get): 260}, 400, "have one id"),
    "a byte without a token": (lambda v: without(v, "A"), 399, "no token for the byte 0x41"),
    "a token that is no bytes": (
        lambda v: {**without(v, max(v, key=v.get)), "你": 399},
        400,
        "'你' in its token '你' is no byte",
    ),
}


@pytest.mark.parametrize(("change", "end", "why"), CHANGED.values(), ids=CHANGED.keys())
def test_ids_that_mean_something_else_than_bytes_are_refused(tmp_path, change, end, why):
    KINDS["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = change(definition["model"]["vocab"])
    # merges of tokens that are not there are an error of the library
    vocabulary = definition["model"]["vocab"]
    definition["model"]["merges"] = [
        pair
        for pair in definition["model"]["merges"]
        if {*pair, "".join(pair)} <= vocabulary.keys()
    ]
    definition["added_tokens"][0]["id"] = end
    path.write_text(json.dumps(definition))
    with pytest.raises(FedGPTError, match=why) as refused:
        load_tokenizer(tmp_path)
    assert str(path) in str(refused.value)


def test_an_id_that_no_token_has_and_an_end_token_in_the_middle_are_read(tmp_path):
    """The ids are those of the model's rows, whatever their order."""
    KINDS["bpe"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    moved = renumbered(definition["model"]["vocab"], 300)
    definition["model"]["vocab"] = renumbered({**moved, END: 300}, 310)
    definition["added_tokens"][0]["id"] = 300
    path.write_text(json.dumps(definition))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.end, loaded.vocab_size, loaded.token_bytes[310]) == (300, 402, 0)
    assert loaded.decode([310, 300]) == ""
    assert loaded.decode(loaded.encode(CHINESE)) == CHINESE
    assert loaded.digest != KINDS["bpe"].digest


def test_settings_that_a_library_saved_with_a_tokenizer_change_no_id(tmp_path):
    tokenizer = KINDS["bpe"]
    tokenizer.save(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=9000, pad_id=tokenizer.end, pad_token=END)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(ENGLISH).tolist() == tokenizer.encode(ENGLISH).tolist()


def test_without_public_text_a_tokenizer_is_made_as_the_refusal_advises():
    with pytest.raises(ConfigError) as refused:
        make_tokenizer(TokenizerOptions("bpe", 300), [])
    advises(refused.value, "raise corpus.public or use tokenizer=bytes")
    make_tokenizer(TokenizerOptions("bpe", 300), ["the river rose again"])
    make_tokenizer(TokenizerOptions("bytes"), [])
