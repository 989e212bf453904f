"""What a tokenizer.json does to a text before its merges, if it is byte-level BPE.

    text -> normalizer -> pre_tokenizer                         -> merges
            NFC, ...      Split, Digits, Punctuation; ByteLevel    BPE, each byte a character

Only what keeps every character of the text is read: Unicode's normal forms, and steps that divide
a text. Everything else is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# how a step that divides a text treats the parts that it has found; "Removed" loses them
BEHAVIORS = ("Isolated", "Contiguous", "MergedWithPrevious", "MergedWithNext")
# settings of a BPE for characters or words instead of bytes
NOT_BYTES = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
MOST_IDS = 1 << 20  # the largest vocabularies of today have about 260,000 tokens
MOST_PATTERN = 1 << 12  # characters of a regular expression; those of GPTs have about 200


def byte_characters() -> list[str]:
    """Return the printable character for each byte 0..255 in GPT-2's byte-level vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_OF = {character: byte for byte, character in enumerate(byte_characters())}


@dataclass(frozen=True)
class Pipeline:
    """How text is divided into words, and whether words that are tokens are merged at all."""

    forms: tuple[str, ...]  # of the normalizer
    steps: tuple[tuple[Any, ...], ...]  # of the pre-tokenizer: type, and what changes its result
    ignore_merges: bool  # a word that is a token stays whole

    @property
    def is_gpt2(self) -> bool:
        """Whether text is divided by GPT-2's pattern alone."""
        return astuple(self) == ((), (("ByteLevel", True),), False)

    @property
    def divides_before_spaces(self) -> bool:
        """Whether a new word begins at each space or line end that follows a visible character,
        and nothing on one side of such a place changes the words on the other.

        It holds for GPT-2's pattern, none of whose words has a space after a visible character, and
        which looks ahead at white space only. Digits are divided by the class of a character alone.
        """
        known = all(step[0] == "Digits" for step in self.steps[:-1])
        return not self.forms and known and self.steps[-1] == ("ByteLevel", True)


def read_pipeline(parsed: Mapping[str, Any]) -> Pipeline:
    """The pipeline of a tokenizer.json; raises ValueError unless it keeps the text."""
    model = parsed["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise ValueError(f"its model.type is {kind!r:.40}, not BPE")
    for name in NOT_BYTES:
        if value := model.get(name):
            raise ValueError(f"its model.{name} is {value!r:.40}, so it is no byte-level BPE")
    if dropout := model.get("dropout"):
        raise ValueError(f"its model.dropout is {dropout}, so a text has other ids each time")
    decoders = list(_parts(parsed.get("decoder"), "decoders"))
    if [part.get("type") for part in decoders] != ["ByteLevel"]:
        raise ValueError("its decoder is not ByteLevel alone, so its ids are no bytes")
    return Pipeline(
        tuple(_form(part) for part in _parts(parsed.get("normalizer"), "normalizers")),
        _steps(list(_parts(parsed.get("pre_tokenizer"), "pretokenizers"))),
        bool(model.get("ignore_merges")),
    )


def merges_of(model: Mapping[str, Any]) -> list[list[str]]:
    """The merges as pairs: older versions of the library write "a b", newer ones ["a", "b"]; a
    byte-level token contains no space.
    """
    return [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]


def check_ids(numbers: Sequence[Any]) -> None:
    """Raise ValueError unless these are different ids of a possible vocabulary."""
    if not all(type(number) is int and 0 <= number < MOST_IDS for number in numbers):
        raise ValueError(f"an id of its vocabulary is not a number from 0 to {MOST_IDS - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError("two tokens of its vocabulary have one id")


def _parts(part: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a `Sequence`, in order; of a part that is missing, none."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for each in part[inner]:
            yield from _parts(each, inner)
    else:
        yield part


def _form(part: Mapping[str, Any]) -> str:
    if (kind := part["type"]) not in FORMS:
        raise ValueError(
            f"its normalizer {kind!r:.40} changes the text; allowed are {', '.join(FORMS)}"
        )
    return kind


def _steps(parts: Sequence[Mapping[str, Any]]) -> tuple[tuple[Any, ...], ...]:
    steps = tuple(map(_step, parts))
    if [step[0] for step in steps].count("ByteLevel") != 1:
        raise ValueError("its pre_tokenizer has not one step ByteLevel, so it is no byte-level BPE")
    return steps


def _step(part: Mapping[str, Any]) -> tuple[Any, ...]:
    kind = part["type"]
    if kind == "ByteLevel":
        if part.get("add_prefix_space", True):
            raise ValueError("its pre_tokenizer adds a space to each text (add_prefix_space)")
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part.get("individual_digits"))
    if kind not in ("Split", "Punctuation"):
        raise ValueError(
            f"its pre_tokenizer {kind!r:.40} is not supported; allowed are ByteLevel, Digits, Split"
            " and Punctuation"
        )
    if (behavior := part.get("behavior", "Isolated")) not in BEHAVIORS:
        raise ValueError(f"its pre_tokenizer {kind} loses text (behavior {behavior!r:.40})")
    if kind == "Punctuation":
        return kind, behavior
    [(how, pattern)] = part["pattern"].items()
    if len(pattern) > MOST_PATTERN:
        raise ValueError(f"a pattern of its pre_tokenizer has {len(pattern):,} characters")
    return kind, how, pattern, behavior, bool(part.get("invert"))
