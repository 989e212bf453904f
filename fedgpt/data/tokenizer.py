"""Text to token ids and back: byte-level BPE trained on public text, or raw bytes.

    "the river"  -> bpe   -> [the][ river]                    2 ids, of 3 and 6 bytes
    "the river"  -> bytes -> [t][h][e][ ][r][i][v][e][r]      9 ids, of 1 byte each
    end of a document     -> [<|endoftext|>]                  the last id, of 0 bytes

Both are one class over one file, `tokenizer.json` in Hugging Face's format (raw bytes are a BPE
without merges), so transformers can read an exported model. Bits per byte are computed from the
number of bytes of each id.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import check_file, is_there, once, read_file, write_text
from fedgpt.core.options import TokenizerOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

END = "<|endoftext|>"
# characters in one string for the library, whose time per character grows with the string's length
PIECE = 4096
# settings of a BPE with which the same vocabulary and merges give other tokens
CHANGES = (
    *("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback"),
    "ignore_merges",
)
BATCH = 512  # number of pieces in one call, which limits the memory of the library's results

# GPT-2's pattern always starts a new word between a visible character and a space or line end, so
# cutting a text there changes no id.
BOUNDARY = re.compile(r"(?<=\S)(?=[ \n])")


def byte_characters() -> list[str]:
    """Return the printable character for each byte 0..255 in GPT-2's byte-level vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class Tokenizer:
    """A byte-level vocabulary: any Unicode text round-trips exactly, and there is no unknown token.

    A literal `<|endoftext|>` in a text is encoded as ordinary characters, never as the end token.
    """

    def __init__(self, definition: str):
        """Read the content of a `tokenizer.json`; raises ValueError unless it is byte-level BPE
        whose text is not changed before it is encoded.
        """
        from tokenizers import Tokenizer as Library

        self.definition = definition  # the content of its tokenizer.json
        parsed = json.loads(definition, object_pairs_hook=once)
        try:
            self._library = Library.from_str(definition)
        except Exception as error:  # the library raises no narrower class
            raise ValueError(str(error)) from error
        _check_pipeline(parsed)
        # transformers saves the settings of its last call with the tokenizer
        self._library.no_truncation()
        self._library.no_padding()
        self._library.encode_special_tokens = True  # as characters, see above
        entries = _entries(parsed)
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._table = [bytes(byte_of[character] for character in name) for name in entries] + [b""]
        # older versions of the library write "a b", newer ones ["a", "b"]; a byte-level token
        # contains no space
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge
            for merge in parsed["model"]["merges"]
        ]
        self._identity = json.dumps([entries, merges])
        self._plain = not merges and self._table == [*(bytes([byte]) for byte in range(256)), b""]

    @property
    def vocab_size(self) -> int:
        """Number of ids, including the end token."""
        return len(self._table)

    @property
    def end(self) -> int:
        """Id of the end of a document: the last one."""
        return len(self._table) - 1

    @property
    def name(self) -> str:
        """The choice of `tokenizer=`: bytes or bpe."""
        return "bytes" if self._plain else "bpe"

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of each id, (vocab_size,) int64; 0 for the end token."""
        return np.array([len(entry) for entry in self._table], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Short hash of vocabulary and merges; with equal digests models can be exchanged."""
        return hashlib.sha256(self._identity.encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, (tokens,) int64, without an end token."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (tokens,) int64.

        The library uses all cores; RAYON_NUM_THREADS limits them.
        """
        if self._plain:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        ids = [array("I") for _ in texts]
        pieces = ((number, piece) for number, text in enumerate(texts) for piece in _pieces(text))
        while batch := list(islice(pieces, BATCH)):
            encoded = self._library.encode_batch_fast(
                [piece for _, piece in batch], add_special_tokens=False
            )
            for (number, _), encoding in zip(batch, encoded, strict=True):
                ids[number].extend(encoding.ids)
        return [np.array(each, dtype=np.int64) for each in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without end tokens; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self._table[int(token)] for token in ids).decode("utf-8", errors="replace")

    def save(self, folder: str | Path, length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads.

        `length` is the longest text, in tokens, of the model that is in the same folder.
        """
        settings: dict[str, str | int | bool] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "unk_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
        }
        if length is not None:
            settings["model_max_length"] = length
        write_text(Path(folder) / "tokenizer.json", self.definition)
        write_text(Path(folder) / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer in `folder`: tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises FedGPTError, naming the file, if there is none that fedgpt can read.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    pair = folder / "vocab.json", folder / "merges.txt"
    if not is_there(path) and any(map(is_there, pair)):
        path = pair[0]
        for part, other in (pair, pair[::-1]):
            if not is_there(part):
                raise FedGPTError(
                    f"{part} is missing, and {other.name} alone is no tokenizer; copy it from the"
                    " model's source into the folder"
                )
            check_file(part)
    content = read_file(path)
    try:
        return Tokenizer(_of_pair(*pair) if path == pair[0] else content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FedGPTError(f"{path}: no tokenizer that fedgpt can read ({reason})") from error


def _of_pair(vocabulary: Path, merges: Path) -> str:
    """The content of the tokenizer.json that equals GPT-2's two files; raises ValueError."""
    from tokenizers import models

    more = vocabulary.parent / "added_tokens.json"
    if more.exists():
        raise ValueError(f"{more.name} adds to its vocabulary")
    settings = vocabulary.parent / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8") if settings.exists() else "{}"
    config = json.loads(text, object_pairs_hook=once)
    if not isinstance(config, dict) or config.get("add_prefix_space"):
        raise ValueError(f"{settings.name} has no mapping, or add_prefix_space is true in it")
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"with {merges.name}: {error}") from error
    json.loads(vocabulary.read_text(encoding="utf-8"), object_pairs_hook=once)
    return _with_end(_byte_level(model))


def _byte_level(model: models.BPE) -> Library:
    """The library's tokenizer of texts as they are, without an end token."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, pre_tokenizers

    library = Library(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def _with_end(library: Library) -> str:
    """The definition of a tokenizer, with the end token behind its vocabulary."""
    from tokenizers import AddedToken

    library.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return library.to_str()


def make_tokenizer(options: TokenizerOptions, public_texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer that the options choose; bpe is trained on `public_texts` only.

    The same texts give the same tokenizer. Its vocabulary is smaller than vocab_size if no other
    pair of tokens occurs twice. Raises ConfigError for wrong options and for bpe without text.
    """
    if problems := list(options.problems()):
        raise ConfigError(problems)
    from tokenizers import models, trainers

    plain = {name: byte for byte, name in enumerate(byte_characters())}
    library = _byte_level(
        models.BPE(vocab=plain, merges=[]) if options.name == "bytes" else models.BPE()
    )
    if options.name == "bpe":
        texts = filter(None, public_texts)
        if (first := next(texts, None)) is None:
            raise ConfigError(
                "tokenizer.name=bpe: has no public text to be trained on; raise corpus.public or"
                " use tokenizer=bytes"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=options.vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(byte_characters()),
            show_progress=False,
        )
        texts = chain([first], texts)
        library.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    # Added after training, because the trainer would give a special token id 0.
    return Tokenizer(_with_end(library))


def _pieces(text: str) -> Iterator[str]:
    """Yield consecutive parts of about PIECE characters, cut where no token can span the cut."""
    start = 0
    while start < len(text):
        match = BOUNDARY.search(text, start + PIECE)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end


def _check_pipeline(parsed: Any) -> None:
    """Raise ValueError unless a tokenizer.json cuts text as GPT-2 does and changes none of it."""
    before = parsed.get("pre_tokenizer") or {}
    model = parsed["model"]
    wrong = {
        "normalizer": parsed.get("normalizer"),
        "model.type": model.get("type", "BPE") != "BPE",
        "pre_tokenizer": before.get("type") != "ByteLevel"
        or before.get("add_prefix_space", True)
        or not before.get("use_regex", True),
        **{f"model.{name}": model.get(name) for name in CHANGES},
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"its {name} changes how text is encoded; fedgpt's tokenizers are as GPT-2's"
            )


def _entries(parsed: Any) -> list[str]:
    """The vocabulary in the order of its ids, without the end token, which must be behind it."""
    vocabulary = parsed["model"]["vocab"]
    names = sorted((name for name in vocabulary if name != END), key=vocabulary.__getitem__)
    added = {token["content"]: token["id"] for token in parsed["added_tokens"]}
    if (
        [vocabulary[name] for name in names] != list(range(len(names)))
        or vocabulary.get(END, len(names)) != len(names)
        or added != {END: len(names)}
        or not set(byte_characters()).issuperset("".join(names))
        or not set(byte_characters()).issubset(names)
    ):
        raise ValueError(f"not a byte-level vocabulary that ends with {END}, its only added token")
    return names
