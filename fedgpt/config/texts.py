"""Options that are texts: Hydra gets exactly the characters that were typed.

Hydra reads a value by its look: 2024_10 and 1e5 as numbers, true as a truth value. So the value of
an option that is a text is passed on in quotes. Three things keep a meaning of their own:

    init_from=null       no value, if the option may be null
    name='"a, b"'        a value between quotes is the text between them
    'run_dir=out/${seed}'    a reference to another option; \\${ types the characters ${

A prompt is text for the model, so it has no references. In a sweep (-m) commas separate the values.
"""

from __future__ import annotations

import re
from types import NoneType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from fedgpt.core.options import OPTIONS

TEXTS = {key for key, one in OPTIONS.items() if str in one.kinds}
LISTS = {key for key, one in OPTIONS.items() if {list[str], list[Any]} & {*one.kinds}}
# options whose value may be any text, so that a comma in it does not mean a sweep without -m
FREE_TEXTS = {key for key in TEXTS if not OPTIONS[key].facts.allowed.choices}
NO_REFERENCES = {"evaluate.prompt"}
QUOTES = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
# one value of a sweep: up to the next comma that is not in quotes
IN_SWEEP = re.compile(rf"\s*({QUOTES}|[^,]*?)\s*(?:,|$)", re.DOTALL)
IN_LIST = re.compile(rf"{QUOTES}|[^,\[\]]+", re.DOTALL)
FUNCTION = re.compile(r"(?:choice|range|interval|glob|sort|shuffle|tag)\(.*\)")


def quoted(word: str, sweep: bool = False) -> str:
    """A word with its value in quotes, if the option is a text; also the texts of a list.

    >>> quoted("corpus.path=~/my notes"), quoted("seed=0,1")
    ('corpus.path="~/my notes"', 'seed=0,1')
    >>> quoted("name=2024_10"), quoted("name=1e5,'a,b'", sweep=True)
    ('name="2024_10"', 'name="1e5","a,b"')
    >>> quoted("model.trainable=[lm_head,1e5]")
    'model.trainable=[lm_head,"1e5"]'
    """
    key, equals, value = word.partition("=")
    option = key.lstrip("+")
    if not equals or option not in TEXTS | LISTS:
        return word
    if option in LISTS:
        # what is in a mapping are arguments of a class, which have types of their own
        keep = "{" in value
        return word if keep else f"{key}={IN_LIST.sub(_in_list, value)}"
    if sweep and FUNCTION.fullmatch(value):
        return word
    if not sweep and option not in FREE_TEXTS and _is_sweep(word):
        return word
    values = [value]
    if sweep and "," in value:
        values = [match[1] for match in IN_SWEEP.finditer(value)]
        values = values[:-1] if value.rstrip()[-1:] != "," else values  # an empty match at the end
    return f"{key}={','.join(_one(option, text) for text in values)}"


def escaped(text: str) -> str:
    r"""A text whose `${` means these characters, not a reference, where OmegaConf resolves it.

    >>> escaped("costs ${price}")
    'costs \\${price}'
    """
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _one(option: str, text: str) -> str:
    """One value of an option as Hydra must get it."""
    if text == "null" and NoneType in OPTIONS[option].kinds:
        return text
    text = _between_quotes(text)
    text = escaped(text) if option in NO_REFERENCES else text
    return QuotedString(text, Quote.double).with_quotes()


def _between_quotes(text: str) -> str:
    """The text in the quotes, if there are quotes around the whole of it."""
    if not re.fullmatch(QUOTES, text, re.DOTALL):
        return text
    value = OverridesParser.create().parse_rule(text, "primitive")
    return value.text if isinstance(value, QuotedString) else text


def _in_list(match: re.Match[str]) -> str:
    """A text of a list; in quotes where Hydra's grammar would read something else."""
    text = match[0]
    try:
        read = OverridesParser.create().parse_rule(text.strip(), "primitive")
    except HydraException:
        return text
    except ValueError:  # an integer of more than 4300 digits
        read = 0
    if isinstance(read, int | float):
        return QuotedString(text.strip(), Quote.double).with_quotes()
    return text


def _is_sweep(word: str) -> bool:
    try:
        return OverridesParser.create().parse_override(word).is_sweep_override()
    except (HydraException, ValueError):
        return False
