"""Text to token ids and back: byte-level BPE, trained on public text or read from a folder, or
raw bytes.

    "the river"  -> bpe   -> [the][ river]                    2 ids, of 3 and 6 bytes
    "the river"  -> bytes -> [t][h][e][ ][r][i][v][e][r]      9 ids, of 1 byte each
    end of a document     -> [<|endoftext|>]                  one id, of 0 bytes

All are one class over one file, `tokenizer.json` in Hugging Face's format (raw bytes are a BPE
without merges), so transformers can read an exported model. Bits per byte are computed from the
number of bytes of each id.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import is_there, once, type_word, write_text
from fedgpt.core.gguf_file import is_gguf
from fedgpt.core.options import TokenizerOptions
from fedgpt.data.byte_level import byte_characters
from fedgpt.data.gguf_tokenizer import read_gguf_tokenizer
from fedgpt.data.tokenizer_files import (
    CONFIG,
    MOST_CHARACTERS,
    OWN,
    TOKENIZER,
    VOCABULARIES,
    byte_level,
    read_files,
    read_settings,
    unreadable,
    with_end,
)
from fedgpt.data.vocabulary import read_vocabulary, without_panic

# characters in one string for the library, whose time per character grows with the string's length
PIECE = 4096
BATCH = 512  # number of pieces in one call, which limits the memory of the library's results

# where a text may be cut; see Pipeline.divides_before_spaces
BOUNDARY = re.compile(r"(?<=\S)(?=[ \n])")


class Tokenizer:
    """A byte-level vocabulary: there is no unknown token, and no text is changed but by a normal
    form of Unicode that the tokenizer asks for.

    The text of a special token, such as a literal `<|endoftext|>`, is encoded as ordinary
    characters, never as that token. A byte that the vocabulary lacks (`lost`) is left out.
    """

    def __init__(self, definition: str):
        """Read the content of a `tokenizer.json`, or a JSON object of the contents of a tokenizer's
        files by name (tokenizer_files.py).

        Raises ValueError unless it is byte-level BPE that keeps the text, and has an end token.
        """
        if len(definition) > MOST_CHARACTERS:
            raise ValueError(f"it has {len(definition):,} characters, and none has so many")
        parsed = json.loads(definition, object_pairs_hook=once)
        files = {TOKENIZER: definition}
        if isinstance(parsed, dict) and TOKENIZER in parsed:
            files = _texts(parsed)
            parsed = json.loads(files[TOKENIZER], object_pairs_hook=once)
        settings = read_settings(files)
        try:
            self._vocabulary = read_vocabulary(files[TOKENIZER], parsed, settings)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it has another structure ({error!r:.100})") from error
        more = {name: value for name, value in settings.items() if name != "model_max_length"}
        self._own = self._vocabulary.is_own and more in ({}, OWN)
        # what tokenizer_config.json has of a tokenizer that is not fedgpt's own
        self.settings: Mapping[str, Any] = {} if self._own else settings
        self._content = files[TOKENIZER]

    @cached_property
    def definition(self) -> str:
        """What makes the same tokenizer elsewhere, with its settings; see `__init__`."""
        if not self.settings:
            return self._content
        files = {TOKENIZER: self._content, CONFIG: json.dumps(self.settings)}
        return json.dumps(files, ensure_ascii=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, including those of special tokens and any that no token has."""
        return len(self._vocabulary.table)

    @property
    def end(self) -> int:
        """Id of the end of a document."""
        return self._vocabulary.end

    @property
    def specials(self) -> Mapping[str, int]:
        """Text -> id of each special token. No text is encoded as one of these ids."""
        return self._vocabulary.specials

    @property
    def lost(self) -> bytes:
        """The bytes of UTF-8 text that no token has."""
        return self._vocabulary.lost

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template, which fedgpt's data code never renders."""
        template = self.settings.get("chat_template")
        if isinstance(template, list):
            return next((each["template"] for each in template if each["name"] == "default"), None)
        return template

    @property
    def name(self) -> str:
        """The choice of `tokenizer=` that makes such a tokenizer: bytes, bpe or hf."""
        if self._vocabulary.is_bytes:
            return "bytes"
        return "bpe" if self._own else "hf"

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Number of bytes of text of each id, (vocab_size,) int64; 0 for special tokens."""
        return np.array(self._vocabulary.sizes, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """Short hash of all that decides the ids of a text and its end; with equal digests models
        can be exchanged.
        """
        return hashlib.sha256(self._vocabulary.identity.encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, (tokens,) int64, without an end token."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, (tokens,) int64.

        The library uses all cores; RAYON_NUM_THREADS limits them. Raises FedGPTError for a pattern
        of a tokenizer that takes too many steps on a text.
        """
        if self._vocabulary.is_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
        ids = [array("I") for _ in texts]
        cut = _pieces if self._vocabulary.divides_before_spaces else _whole
        pieces = ((number, piece) for number, text in enumerate(texts) for piece in cut(text))
        while batch := list(islice(pieces, BATCH)):
            with without_panic():
                encoded = self._vocabulary.library.encode_batch_fast(
                    [piece for _, piece in batch], add_special_tokens=False
                )
            for (number, _), encoding in zip(batch, encoded, strict=True):
                ids[number].extend(encoding.ids)
        return [np.array(each, dtype=np.int64) for each in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids, without special tokens; invalid UTF-8 becomes U+FFFD.

        Ids that the vocabulary does not have, as the rows that pad a model, are left out.
        """
        table = self._vocabulary.table
        known = (table[int(token)] for token in ids if int(token) < len(table))
        return b"".join(known).decode("utf-8", errors="replace")

    def save(self, folder: str | Path, length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers' AutoTokenizer reads.

        `length` is the longest text, in tokens, of the model that is in the same folder.
        """
        # not the class that the folder named: transformers makes some without tokenizer.json
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self._own:
            settings |= OWN
        else:
            [end] = (name for name, number in self.specials.items() if number == self.end)
            settings |= {"eos_token": end, **self.settings}
        if length is not None:
            settings["model_max_length"] = length
        write_text(Path(folder) / TOKENIZER, self._content)
        write_text(Path(folder) / CONFIG, json.dumps(settings, indent=2) + "\n")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Return the tokenizer in a folder: tokenizer.json, or GPT-2's vocab.json and merges.txt, with
    the settings beside it; or the one in a GGUF file.

    Raises FedGPTError, naming the file, if there is none that fedgpt can read.
    """
    path = Path(source)
    if is_gguf(path):
        files = read_gguf_tokenizer(path)
    else:
        path, files = read_files(path)
    try:
        definition = json.dumps(files, ensure_ascii=False) if len(files) > 1 else files[TOKENIZER]
        return _made(definition)
    except (ValueError, RecursionError, FedGPTError) as error:
        raise unreadable(path, error) from error


@lru_cache(maxsize=2)
def _made(definition: str) -> Tokenizer:
    """A tokenizer, which may have been made before: a run reads that of its model many times."""
    return Tokenizer(definition)


def make_tokenizer(options: TokenizerOptions, public_texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer that the options choose; only bpe is trained, on `public_texts`.

    The same texts give the same tokenizer. Its vocabulary is smaller than vocab_size if no other
    pair of tokens occurs twice. Raises ConfigError for wrong options, for bpe without text, and for
    a folder without a tokenizer that fedgpt can read.
    """
    if problems := list(options.problems()):
        raise ConfigError(problems)
    if options.name == "hf":
        assert options.path is not None, "one of the problems above"
        return _of_folder(options.path)
    from tokenizers import models, trainers

    plain = {name: byte for byte, name in enumerate(byte_characters())}
    library = byte_level(
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
    return Tokenizer(with_end(library))


def _of_folder(path: str) -> Tokenizer:
    """The tokenizer that the user names: of a model's folder or GGUF file, or of a finished run."""
    folder = Path(path)
    if not is_gguf(folder) and not any(is_there(folder / name) for name in VOCABULARIES):
        if not is_there(folder / "model" / TOKENIZER):
            raise ConfigError(
                f"tokenizer.path={path}: has no {TOKENIZER}; name the folder of a Hugging Face"
                " tokenizer, or of a finished run"
            )
        folder = folder / "model"
    try:
        return load_tokenizer(folder)
    except FedGPTError as error:
        where = str(error).replace(f"{path.rstrip('/')}/", "")
        raise ConfigError(f"tokenizer.path={path}: {where}") from error


def _texts(files: Mapping[str, Any]) -> dict[str, str]:
    """The contents of files by name, as they are; raises ValueError for others than texts."""
    if wrong := [name for name, content in files.items() if not isinstance(content, str)]:
        raise ValueError(f"{wrong[0]!r:.40} in it has {type_word(files[wrong[0]])}, not a text")
    return dict(files)


def _whole(text: str) -> Iterator[str]:
    """Yield a text as it is, unless it is empty."""
    yield from filter(None, [text])


def _pieces(text: str) -> Iterator[str]:
    """Yield consecutive parts of about PIECE characters, cut where no token can span the cut."""
    start = 0
    while start < len(text):
        match = BOUNDARY.search(text, start + PIECE)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end
