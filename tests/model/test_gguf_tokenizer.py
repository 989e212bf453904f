"""Tokenizers in GGUF files: ids equal to those of transformers, and of llama.cpp's own patterns."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gguf_files import miniature
from test_gguf import LLAMA, theirs

from fedgpt.core.errors import FedGPTError
from fedgpt.data.tokenizer import byte_characters
from fedgpt.model.gguf import read_gguf

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
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
        st.sampled_from(" \t\n\r'’sStTlLdDrReEmM0123456789²Ⅷ٣.,!?-_()<>|#éÉßñ語мир\u0301\u200d🦙"),
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
    """A Hugging Face folder of each kind, beside the GGUF file that it was made from."""
    found = {}
    for name in PATTERNS:
        found[name] = folder = tmp_path_factory.mktemp(name)
        model = read_gguf(written(folder / "model.gguf", tokenizer_pre=name))
        for file, content in model.tokenizer_files().items():
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
            for start, end in zip(places, places[1:], strict=False)
            if start < end
        ]
    return found


def merged(piece, whole):
    """The ids of a piece, merged by hand: always the pair of the first merge."""
    spell = byte_characters()
    symbols = [spell[byte] for byte in piece.encode()]
    if whole and "".join(symbols) in NORMAL:
        symbols = ["".join(symbols)]
    while len(symbols) > 1:
        pairs = list(zip(symbols, symbols[1:], strict=False))
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
