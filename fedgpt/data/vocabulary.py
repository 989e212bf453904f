"""The vocabulary of a tokenizer: the bytes of each id, the special tokens, and the end token.

    id   token          special   bytes                 from
    0    <|endoftext|>  yes       (none)                added_tokens
    17   Ġthe                     20 74 68 65           model.vocab, each byte a character
    50   "   "                    20 20 20              added_tokens, not special: as it stands

The library decides the ids of the added tokens, as it does for transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedgpt.core.errors import FedGPTError
from fedgpt.data.byte_level import (
    BYTE_OF,
    Pipeline,
    check_ids,
    merges_of,
    read_pipeline,
)
from fedgpt.data.tokenizer_files import CONFIG, END, content_of, special_tokens

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

# bytes without which no text can be written; others, such as control characters, may be missing
NEEDED = frozenset(b"\n") | frozenset(range(32, 127))
IN_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a `Tokenizer` needs of its files."""

    library: Library
    table: list[bytes]  # what each id adds to a text that is decoded
    sizes: list[int]  # bytes of the text of which each id is made
    specials: Mapping[str, int]
    end: int
    lost: bytes  # bytes of UTF-8 that no token has
    identity: str  # all that decides ids and end
    is_own: bool  # as fedgpt makes it, or GPT-2: END alone is added, behind the rest
    divides_before_spaces: bool  # whether a text may be cut before a space; see Pipeline

    @cached_property
    def is_bytes(self) -> bool:
        """Whether each byte is its own id, and nothing is merged."""
        return self.is_own and self.table == [*(bytes([byte]) for byte in range(256)), b""]


def read_vocabulary(
    content: str, parsed: Mapping[str, Any], settings: Mapping[str, Any]
) -> Vocabulary:
    """The vocabulary of a tokenizer.json, `content` and the same as JSON, with settings.

    Raises ValueError unless it is byte-level BPE that keeps the text, and has an end token.
    """
    library = _library(content)
    pipeline = read_pipeline(parsed)
    vocabulary: dict[str, int] = parsed["model"]["vocab"]
    lost = _lost(vocabulary)
    if lost and parsed["model"].get("unk_token") is not None:
        # it would stand in place of the byte, and is a special token, which no text may have
        content = json.dumps({**parsed, "model": {**parsed["model"], "unk_token": None}})
        library = _library(content)
    _check_added(library, parsed["added_tokens"])
    _add(library, settings)
    end = _end(library, settings)
    # transformers saves the settings of its last call with the tokenizer
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # as characters
    added = library.get_added_tokens_decoder()
    specials = {token.content: number for number, token in added.items() if token.special}
    with without_panic():
        _check_specials(library, specials, {*special_tokens(settings)})
    merges = merges_of(parsed["model"])
    names = sorted(vocabulary.keys() - specials.keys(), key=vocabulary.__getitem__)
    is_own = (
        pipeline.is_gpt2
        and not lost
        and [token.content for token in added.values()] == [END]
        and specials == {END: len(names)}
        and [vocabulary[name] for name in names] == list(range(len(names)))
    )
    identity = [names, merges]
    if not is_own:
        by_id = sorted(vocabulary.items(), key=lambda item: item[1])
        flags = [[number, *_flags(token)] for number, token in sorted(added.items())]
        identity = [by_id, merges, astuple(pipeline), flags, end]
    return Vocabulary(
        library,
        *_tables(vocabulary, added),
        *(specials, end, lost, json.dumps(identity), is_own),
        _divides_before_spaces(pipeline, added),
    )


def _lost(vocabulary: Mapping[str, int]) -> bytes:
    """The bytes of UTF-8 that no token has; raises ValueError if these are common ones."""
    gone = {byte for character, byte in BYTE_OF.items() if character not in vocabulary}
    if absent := NEEDED & gone:
        raise ValueError(f"not byte-level: no token for the byte 0x{min(absent):02x}")
    return bytes(sorted(gone & IN_UTF8))


def _tables(
    vocabulary: Mapping[str, int], added: Mapping[int, AddedToken]
) -> tuple[list[bytes], list[int]]:
    """What each id adds to a text that is decoded, and the bytes of the text that it was made of.

    They differ for an added token whose text is of characters that stand for bytes, such as "é":
    the library decodes it as these bytes.
    """
    numbers = {**vocabulary, **{token.content: number for number, token in added.items()}}
    check_ids([*numbers.values()])
    table = [b""] * (max(numbers.values()) + 1)
    for name, number in vocabulary.items():
        if number not in added:
            table[number] = _bytes_of(name)
    sizes = [len(entry) for entry in table]
    for number, token in added.items():
        if not token.special:
            text = token.content.encode()
            plain = BYTE_OF.keys() >= set(token.content)
            table[number], sizes[number] = _bytes_of(token.content) if plain else text, len(text)
    return table, sizes


def _library(content: str) -> Library:
    from tokenizers import Tokenizer as Library

    try:
        with without_panic():
            return Library.from_str(content)
    except Exception as error:  # the library raises no narrower class
        raise ValueError(str(error)) from error


@contextmanager
def without_panic() -> Iterator[None]:
    """Turn a panic of the library into a FedGPTError: it is no Exception, and would end the process
    of a site whose server sends a pattern that takes too many steps on a text.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which has no name to import
            raise
        reason = " ".join(str(error).split())
        raise FedGPTError(f"the tokenizer fails on a text ({reason:.200})") from error


def _bytes_of(name: str) -> bytes:
    if wrong := set(name) - BYTE_OF.keys():
        raise ValueError(
            f"not a byte-level vocabulary: {min(wrong)!r} in its token {name!r:.40} is no byte"
        )
    return bytes(BYTE_OF[character] for character in name)


def _check_added(library: Library, tokens: list[Mapping[str, Any]]) -> None:
    """Raise ValueError if the library gives an added token another id than the file."""
    for token in tokens:
        name, number = token["content"], token["id"]
        if (found := library.token_to_id(name)) != number:
            raise ValueError(
                f"its added token {name!r:.40} has the id {number}, and must be {found}"
            )


def _add(library: Library, settings: Mapping[str, Any]) -> None:
    """Give the library the added tokens and special tokens of the settings, as transformers does,
    but for tokens that tokenizer.json does not have: no text and no model has their ids.
    """
    from tokenizers import AddedToken

    for number, about in settings.get("added_tokens_decoder", {}).items():
        name = content_of("added_tokens_decoder", about if isinstance(about, dict) else None)
        if (found := library.token_to_id(name)) is not None and str(found) != number:
            raise ValueError(
                f"{CONFIG}: added_tokens_decoder gives {name!r:.40} the id {number!r:.20}, and"
                f" tokenizer.json {found}"
            )
        if found is not None:
            try:
                library.add_tokens([AddedToken(**about)])
            except TypeError as error:
                raise ValueError(f"{CONFIG}: added_tokens_decoder: {error}") from error
    added = {token.content for token in library.get_added_tokens_decoder().values()}
    for name in special_tokens(settings):
        if name not in added and library.token_to_id(name) is not None:
            library.add_tokens([AddedToken(name, special=True)])


def _end(library: Library, settings: Mapping[str, Any]) -> int:
    """The id of the end token, which becomes a special one."""
    from tokenizers import AddedToken

    added = library.get_added_tokens_decoder().values()
    specials = [token.content for token in added if token.special]
    if "eos_token" in settings:
        name = settings["eos_token"]
    elif library.token_to_id(END) is not None:
        name = END
    elif len(specials) == 1:
        name = specials[0]
    else:
        raise ValueError(
            f"no file names its eos_token, and it has {len(specials)} special tokens, none of which"
            f" is {END}"
        )
    if (number := library.token_to_id(name)) is None:
        raise ValueError(f"{CONFIG}: eos_token {name!r:.40} is not in the vocabulary")
    library.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    return number


def _check_specials(library: Library, specials: Mapping[str, int], told: set[str]) -> None:
    """Raise ValueError if a text can have the id of a special token; `told`: by the settings."""
    for name, number in specials.items():
        texts = [name]
        if BYTE_OF.keys() >= set(name):  # as the vocabulary may write other bytes
            texts.append(_bytes_of(name).decode(errors="ignore"))
        ids = (library.encode(text, add_special_tokens=False).ids for text in texts)
        if name in BYTE_OF or any(number in each for each in ids):
            where = f"{CONFIG}: the" if name in told else "its"
            raise ValueError(f"{where} special token {name!r:.40} is a word of ordinary text too")


def _flags(token: AddedToken) -> tuple[Any, ...]:
    strips = token.lstrip, token.rstrip
    return token.content, *strips, token.single_word, token.normalized, token.special


def _divides_before_spaces(pipeline: Pipeline, added: Mapping[int, AddedToken]) -> bool:
    """Whether the pipeline does, and no added token has a space or takes those beside it."""
    return pipeline.divides_before_spaces and not any(
        token.lstrip or token.rstrip or any(map(str.isspace, token.content))
        for token in added.values()
    )
