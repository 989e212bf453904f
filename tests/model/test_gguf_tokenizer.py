"""Tokenizers in GGUF files: ids equal to those of transformers, and of llama.cpp's own patterns."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import miniature
from test_gguf import LLAMA, theirs

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import TokenizerOptions
from fedgpt.data.gguf_tokenizer import read_gguf_tokenizer
from fedgpt.data.tokenizer import byte_characters, make_tokenizer
from fedgpt.model.gguf import read_gguf
from fedgpt.model.shape import count_parameters
from fedgpt.storage.init_from import check_tokenizer
from fedgpt.storage.initial_weights import initial_weights

transformers = pytest.importorskip("transformers")
regex = pytest.importorskip("regex")

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "two  words"]  # user defined
PRACTICE = [
    "The river and the ships of the river, it's 12 years; they'll see 1234 and 2024 again.",
    "\n\n  def river(x):\n\treturn x  # the river's   end!!! ???\r\n",
    "Größe und Größe, 语言语言 мир мир, 1 2 33 333, <think> it's I'LL we've",
] * 4
# what llama.cpp does with a text, one pattern after the other (src/llama-vocab.cpp)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CASED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "qwen2": [CASED + r"\p{N}" + REST],
    "llama-bpe": [CASED + r"\p{N}{1,3}" + REST],
}
texts = st.text(
    st.one_of(
        st.sampled_from(
            " \t\n\r'\u2019sStTlLdDrReEmM0123456789²Ⅷ٣.,!?-_()<>|#éÉßñ語мир\u0301\u200d🦙"
        ),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
) | st.lists(
    st.sampled_from([*SPECIALS, *ADDED, " ", "  ", "river", "12", "\n\n", "'ll"]), max_size=12
).map("".join)


def trained():
    """Tokens and merges of a small byte-level BPE."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(byte_characters()), show_progress=False
    )
    library.train_from_iterator(PRACTICE, trainer)
    model = json.loads(library.to_str())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    return vocabulary, [" ".join(merge) for merge in model["merges"]]


NORMAL, MERGES = trained()
# special tokens in front as in SmolLM2, added ones and a row that pads the embedding behind
TOKENS = [*SPECIALS, *NORMAL, *ADDED, "[PAD9]"]
TYPES = [3] * len(SPECIALS) + [1] * len(NORMAL) + [4] * len(ADDED) + [5]
TOKENIZER = {
    "tokenizer_model": "gpt2",
    "tokenizer_pre": "smollm",
    "token_list": TOKENS,
    "token_types": TYPES,
    "token_merges": MERGES,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "unk_token_id": 0,
    "add_bos_token": False,
    "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
}
SIZES = LLAMA | {"vocab_size": len(TOKENS), "hidden_size": 12, "intermediate_size": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}


def written(path, **changes):
    """A file with a tokenizer; a change to None leaves a part of it out."""
    parts = {name: part for name, part in (TOKENIZER | changes).items() if part is not None}
    sizes = SIZES | {"vocab_size": len(parts.get("token_list", TOKENS))}
    return miniature(path, theirs("llama", sizes), tokenizer=parts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A Hugging Face folder of each kind, and in its folder `from` the GGUF file."""
    found = {}
    for name in PATTERNS:
        found[name] = folder = tmp_path_factory.mktemp(name)
        (folder / "from").mkdir()
        model = read_gguf(written(folder / "from" / "model.gguf", tokenizer_pre=name))
        for file, content in read_gguf_tokenizer(model.path).items():
            (folder / file).write_text(content, encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(model.config))
    return found


def library(folder):
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def pieces(text, patterns):
    """The pieces of a text after each pattern: its matches, and what is between them."""
    found = [text]
    for pattern in patterns:
        matches = [[*regex.finditer(pattern, piece)] for piece in found]
        cuts = [
            [0, *(place for match in each for place in match.span()), len(piece)]
            for piece, each in zip(found, matches, strict=True)
        ]
        found = [
            piece[start:end]
            for piece, places in zip(found, cuts, strict=True)
            for start, end in pairwise(places)
            if start < end
        ]
    return found


def merged(piece, whole):
    """The ids of a piece, merged by hand: always the pair of the earliest merge."""
    spell = byte_characters()
    symbols = [spell[byte] for byte in piece.encode()]
    if whole and "".join(symbols) in NORMAL:
        symbols = ["".join(symbols)]
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        ranks = [MERGES.index(" ".join(p)) if " ".join(p) in MERGES else 10**9 for p in pairs]
        if (first := min(ranks)) == 10**9:
            break
        at = ranks.index(first)
        symbols[at : at + 2] = ["".join(pairs[at])]
    return [TOKENS.index(symbol) for symbol in symbols]


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(text=texts.filter(lambda text: not any(t in text for t in [*SPECIALS, *ADDED])))
def test_ids_are_those_of_llama_cpps_patterns_and_merges(folders, name, text):
    """For Qwen2, after NFC, which llama.cpp leaves out and Qwen2's own tokenizer does."""
    ours = library(folders[name]).encode(text).ids
    if name == "qwen2":
        text = tokenizers.normalizers.NFC().normalize_str(text)
    expected = [merged(piece, name == "llama-bpe") for piece in pieces(text, PATTERNS[name])]
    assert ours == [number for ids in expected for number in ids]


@pytest.fixture(scope="module")
def read_by_transformers(folders):
    """The tokenizers that transformers reads from the GGUF files themselves."""
    read = transformers.AutoTokenizer.from_pretrained
    return {name: read(folder / "from", gguf_file="model.gguf") for name, folder in folders.items()}


def same_for_both(name, text):
    """A text on which transformers' reading of a GGUF file does what the model's tokenizer does.

    It splits no digits for smollm, does no NFC for qwen2, and adds no token that has a space.
    """
    text = text.replace(ADDED[1], "")
    if name == "smollm":
        return regex.sub(r"\p{N}", "", text)
    return tokenizers.normalizers.NFC().normalize_str(text) if name == "qwen2" else text


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_ids_are_those_that_transformers_reads_from_the_file(
    folders, read_by_transformers, name, text
):
    text = same_for_both(name, text)
    theirs = read_by_transformers[name](text, add_special_tokens=False).input_ids
    assert library(folders[name]).encode(text).ids == theirs


@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_ids_of_qwen2_are_those_of_its_class_in_transformers(folders, text):
    vocabulary = {token: number for number, token in enumerate(TOKENS[:-1])}
    theirs = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[*map(_pair, MERGES)])
    theirs.add_special_tokens({"additional_special_tokens": SPECIALS})
    added = [tokenizers.AddedToken(token, normalized=False) for token in ADDED]
    theirs.add_tokens(added)
    expected = theirs(text, add_special_tokens=False).input_ids
    assert library(folders["qwen2"]).encode(text).ids == expected


def _pair(merge):
    return tuple(merge.split(" "))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_folder_is_a_tokenizer_for_transformers(folders, read_by_transformers, name):
    ours = transformers.AutoTokenizer.from_pretrained(folders[name])
    theirs = read_by_transformers[name]
    for token in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{token}_token_id") == getattr(theirs, f"{token}_token_id")
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.model_max_length == SIZES["max_position_embeddings"]
    messages = [{"role": "user", "content": "it's 12"}, {"role": "assistant", "content": "é"}]
    assert ours.chat_template == theirs.chat_template == TOKENIZER["chat_template"]
    made = ours.apply_chat_template(messages, tokenize=False)
    assert made == "<|im_start|>it's 12<|im_end|><|im_start|>é<|im_end|>"
    ids = ours(made).input_ids
    assert ids == library(folders[name]).encode(made).ids
    assert ids[0] == 1
    assert ids.count(2) == 2
    assert ours.decode(ids) == made


def test_added_tokens_have_their_kinds_and_unused_ones_are_left_out(folders):
    for folder in folders.values():
        parsed = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        kinds = {token["content"]: token["special"] for token in parsed["added_tokens"]}
        assert kinds == dict.fromkeys(SPECIALS, True) | dict.fromkeys(ADDED, False)
        assert [token["id"] for token in parsed["added_tokens"]] == [
            *range(len(SPECIALS)),
            *range(len(TOKENS) - 3, len(TOKENS) - 1),
        ]
        assert parsed["model"]["vocab"] == {token: n for n, token in enumerate(TOKENS[:-1])}
        ids = library(folder).encode("a <think>two  words</think>").ids
        assert {len(TOKENS) - 3, len(TOKENS) - 2} <= set(ids)


def test_special_ids_of_normal_tokens_are_special(tmp_path):
    """As in llama.cpp and transformers: the id that ends a text is never ordinary text."""
    eos = TOKENS.index("Ġriver")
    path = written(tmp_path / "model.gguf", eos_token_id=eos)
    parsed = json.loads(read_gguf_tokenizer(path)["tokenizer.json"])
    assert {"id": eos, "content": "Ġriver", "special": True}.items() <= max(
        parsed["added_tokens"], key=lambda token: token["id"] == eos
    ).items()


def test_a_beginning_token_is_added_where_the_file_or_the_kind_says_so(tmp_path):
    def settings_of(**changes):
        path = written(tmp_path / "model.gguf", **changes)
        return json.loads(read_gguf_tokenizer(path)["tokenizer_config.json"])

    assert settings_of()["add_bos_token"] is False
    assert settings_of(add_bos_token=None)["add_bos_token"] is False
    assert settings_of(add_bos_token=None, tokenizer_pre="llama-bpe")["add_bos_token"] is True
    said = settings_of(add_bos_token=True, add_eos_token=True, chat_template=None)
    assert (said["add_bos_token"], said["add_eos_token"]) == (True, True)
    assert "chat_template" not in said


REFUSED = {
    "no tokenizer": ({"tokenizer_model": None}, "tokenizer.ggml.model is missing"),
    "SentencePiece": ({"tokenizer_model": "llama"}, "model='llama' is not supported; allowed is"),
    "no pre": ({"tokenizer_pre": None}, "tokenizer.ggml.pre is missing"),
    "other pre": (
        {"tokenizer_pre": "tekken"},
        "pre='tekken' is not supported; allowed are smollm, qwen2, gpt-2 and llama-bpe",
    ),
    "prefix": ({"add_space_prefix": True}, "tokenizer.ggml.add_space_prefix=true is not supported"),
    "no tokens": ({"token_list": None}, "tokenizer.ggml.tokens is missing"),
    "no types": ({"token_types": None}, "tokenizer.ggml.token_type is missing"),
    "fewer types": ({"token_types": TYPES[:-1]}, "[0-9]+ tokens and .* [0-9]+ types; must be"),
    "type": ({"token_types": [*TYPES[:-1], 6]}, "token_type has 6; allowed in byte-level BPE"),
    "token twice": ({"token_list": [*TOKENS[:-1], "a"]}, "the token 'a' stands twice"),
    "no merges": ({"token_merges": None}, "tokenizer.ggml.merges is missing"),
    "merge of one": ({"token_merges": ["abc"]}, "the merge 'abc' is not of two tokens to a third"),
    "merge of three": ({"token_merges": ["a b c"]}, "the merge 'a b c' is not of two tokens to"),
    "merge to no token": ({"token_merges": ["q q"]}, "the merge 'q q' is not of two tokens to"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(tmp_path, changes, message):
    model = read_gguf(written(tmp_path / "model.gguf", **changes))
    with pytest.raises(FedGPTError, match=message) as caught:
        read_gguf_tokenizer(model.path)
    assert str(tmp_path / "model.gguf") in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_tokenizer_gives_its_files_or_a_message(folders, tmp_path_factory, data):
    source = folders["smollm"] / "from" / "model.gguf"
    content = bytearray(source.read_bytes())
    header = min(tensor.start for tensor in read_gguf(source).file.tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    try:
        for written in read_gguf_tokenizer(path).values():
            json.loads(written)
    except FedGPTError as error:
        assert str(path) in str(error)


def test_a_run_takes_its_model_and_its_tokenizer_from_a_file(tmp_path):
    path = written(tmp_path / "model.gguf", token_list=[*TOKENS[:-1], "<pad>"])
    o = compose.load(["model=hf", f"init_from={path}", "corpus.public=0"])
    assert (o.tokenizer.name, o.tokenizer.path) == ("hf", str(path))
    assert (o.model.mlp, o.model.n_kv_head, o.model.vocab_size) == ("swiglu", 1, len(TOKENS))
    tokenizer = make_tokenizer(o.tokenizer, ())
    assert tokenizer.decode(tokenizer.encode("the river <|im_end|>")) == "the river <|im_end|>"
    # the last row pads the embedding
    assert tokenizer.vocab_size == len(TOKENS) - 1
    check_tokenizer(o, tokenizer)
    vector = initial_weights(o, tokenizer)
    assert vector.size == count_parameters(o.model, tokenizer.vocab_size)
    stored = read_gguf(path).read("model.embed_tokens.weight")
    assert vector[: stored.size].reshape(stored.shape).tolist() == stored.tolist()

    other = make_tokenizer(TokenizerOptions("bytes"), ())
    with pytest.raises(ConfigError, match="has another tokenizer"):
        check_tokenizer(replace(o, tokenizer=TokenizerOptions("bytes")), other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"init_from={path}: is damaged: output"):
        compose.load(["model=hf", f"init_from={path}"])
