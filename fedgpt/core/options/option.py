"""The definition of an option: default, help, unit and allowed values in one dataclass field.

A group of options is a subclass of `Group` whose fields are made by `option`. Hydra reads their
types and defaults, `problems` the allowed values, and `fedgpt help` all of them. So each option is
defined once. The fields of a strategy (aggregate/) are such options, too.

>>> @dataclass
... class Oven(Group):
...     group = "oven"
...     degrees: int = option(180, "Temperature.", unit="degrees Celsius", allowed=at_least(0))
>>> list(Oven(degrees=-1).problems())
['oven.degrees=-1: must be at least 0']
>>> [one.key for one in described(Oven)]
['oven.degrees']
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from math import inf, isfinite
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar

from fedgpt.core.errors import nearest

# The largest number of any option, because larger ones overflow or describe a run without end; and
# the smallest number beside 0, because products of smaller ones can become 0 in float32.
LARGEST, SMALLEST = 10**12, 1e-12
LONGEST = 1e9  # seconds, about 30 years; Python waits no longer than 9e9

KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list[float]: "a list of numbers, such as [1,2]",
    list[str]: "a list of texts, such as [a,b]",
    list[Any]: "a list, such as [a,b]",
    dict[str, Any]: "a mapping, such as {a: 1}",
}


@dataclass(frozen=True)
class Allowed:
    """The values that an option may take, as a test and in words that can follow "must be"."""

    words: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()  # all allowed words, if the option has a fixed set of words
    most: float = inf  # the upper end, where `words` do not name it
    least: float = 0.0  # the smallest number beside 0

    def beyond(self, value: float) -> str:
        """The end beyond which a number is, in words like `words`; empty if it is within."""
        if value > self.most:
            return f"at most {self.most}"
        return f"0, or at least {self.least}" if 0 < abs(value) < self.least else ""


ANYTHING = Allowed("", lambda value: True)


def at_least(
    low: float, unit: str = "", *, end: float = LARGEST, zero: str = "", or_zero: str = ""
) -> Allowed:
    """Numbers from `low`; `zero` is the meaning of 0, and `or_zero` also allows 0 below `low`.

    `end` is the upper end beyond which the number cannot work; only an error names it.

    >>> at_least(0, zero="off").words, at_least(1, or_zero="off").words
    ('at least 0 (0 = off)', 'at least 1, or 0 (off)')
    """
    words = " ".join(filter(None, (f"at least {low}", unit, zero and f"(0 = {zero})")))
    if or_zero:
        words = f"{words}, or 0 ({or_zero})"
        return Allowed(words, lambda value: value == 0 or value >= low, (), end, SMALLEST)
    return Allowed(words, lambda value: value >= low, (), end, SMALLEST)


def above(
    low: float, unit: str = "", *, most: float = inf, end: float = LARGEST, or_zero: str = ""
) -> Allowed:
    """Numbers above `low`, up to `most`; `or_zero` is the meaning of 0, if 0 is allowed.

    `end` is the upper end beyond which the number cannot work; only an error names it.

    >>> above(0, "seconds").words, above(0, most=1).words
    ('above 0 seconds', 'above 0 and at most 1')
    """
    words = f"above {low}{f' {unit}' if unit else ''}"
    words += f" and at most {most}" if most < inf else ""
    words += f", or 0 ({or_zero})" if or_zero else ""

    def holds(value: float) -> bool:
        return low < value <= most or (bool(or_zero) and value == 0)

    return Allowed(words, holds, (), end, SMALLEST)


def at_most(high: float) -> Allowed:
    """Numbers up to `high`; the lower end is a matter of the other options of the group."""
    return Allowed(f"at most {high}", lambda value: value <= high)


def between(low: float, high: float) -> Allowed:
    """Numbers from `low` to `high`, both included."""
    words = f"from {low} to {high}"
    return Allowed(words, lambda value: low <= value <= high, least=SMALLEST)


def share(of: str = "", *, zero: bool = True, least: float = SMALLEST) -> Allowed:
    """A part of something: from 0, or above 0, to below 1."""
    words = f"from 0 to below 1{f' ({of})' if of else ''}"
    if not zero:
        return Allowed("between 0 and 1", lambda value: 0 < value < 1, least=least)
    return Allowed(words, lambda value: 0 <= value < 1, least=least)


def one_of(*choices: str) -> Allowed:
    """One word of a few.

    >>> one_of("auto", "fp32", "bf16").words
    'auto, fp32 or bf16'
    """
    words = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    return Allowed(words, choices.__contains__, choices)


@dataclass(frozen=True)
class Facts:
    """The metadata that `option` stores in a field."""

    help: str
    unit: str = ""
    allowed: Allowed = ANYTHING
    only_with: tuple[str, ...] = ()
    built_in: str = ""


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    allowed: Allowed = ANYTHING,
    only_with: tuple[str, ...] = (),
    built_in: str = "",
) -> Any:
    """A dataclass field that is an option of a run.

    `help` consists of complete sentences. `only_with` names the choices of the option's group with
    which the option has an effect (empty: all choices). `built_in` is the package whose modules a
    list may name.
    """
    metadata = {"option": Facts(help, unit, allowed, only_with, built_in)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(*choices: str) -> Any:
    """The field that names the choice of its group; the first choice is the default."""
    return option(
        choices[0],
        "The choice of the group. GROUP=CHOICE sets it; it is not typed itself.",
        allowed=one_of(*choices),
    )


def member(default: str) -> Any:
    """The field that names the chosen class of a group; core/members.py lists the classes."""
    return option(
        default,
        "The choice of the group. GROUP=CHOICE sets it; it is not typed itself.",
    )


def target() -> Any:
    """The field `_target_` of a group whose classes may come from other packages."""
    return option(
        None,
        "Full name of a class of your own, such as my_package.Mine. trusted_packages must list"
        " its package.",
        only_with=("custom",),
    )


def arguments() -> Any:
    """The field `arguments` beside `_target_`."""
    return option({}, "Keyword arguments of the class, such as {size: 3}.")


class Group:
    """A group of options: finds what is wrong with the values of its fields."""

    group: ClassVar[str] = ""  # as typed; empty for the options above the groups
    choice_field: ClassVar[str] = "name"  # the field that names the choice, if the group has one
    reports_unused: ClassVar[bool] = False  # whether `rules` reports values that have no effect

    @classmethod
    def key(cls, name: str) -> str:
        """An option of this group, as it is typed."""
        return f"{cls.group}.{name}" if cls.group else name

    @property
    def chosen(self) -> str:
        """The choice of this group, or an empty text if the group has no such field."""
        return str(getattr(self, self.choice_field, ""))

    def problems(self) -> Iterator[str]:
        """All problems of the values: first of single values, then of combinations."""
        own = fields(self)  # pyright: ignore[reportArgumentType]  # groups are dataclasses
        values = {one.name: getattr(self, one.name) for one in own}
        for one in own:
            value = values[one.name]
            if isinstance(value, Group):
                yield from value.problems()
            elif problem := value_problem(self.key(one.name), value, facts_of(one).allowed):
                yield problem
        yield from self.rules()

    def rules(self) -> Iterator[str]:
        """Problems of combinations of values; a group overrides it."""
        yield from ()

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """(field, reason) for each field without effect beside another value of the group; a group
        overrides it. The reason names that value and what to add.
        """
        yield from ()


def facts_of(one: Field[Any]) -> Facts:
    """The metadata that `option` stored in a field."""
    return one.metadata.get("option", Facts(""))


def value_problem(key: str, value: Any, allowed: Allowed) -> str:
    """The problem of one value, with the allowed values; empty if the value is allowed."""
    if value is None:
        return ""  # null is a matter of the type
    if wrong := _no_text(value):
        return f"{key}={value!a}: {wrong}"
    whole = isinstance(value, Integral)  # which may be too large for isfinite
    if isinstance(value, Real) and not whole and not isfinite(value):
        words = f", {allowed.words}" if allowed.words else ""
        return f"{key}={value}: must be a finite number{words}"
    if isinstance(value, int | float) and (end := allowed.beyond(value)):
        return f"{key}={short(value)}: must be {end}"
    if allowed.holds(value):
        return ""
    shown = short(value) if whole else value
    return f"{key}={shown}: must be {allowed.words}{nearest(str(value), allowed.choices)}"


def short(value: Any) -> str:
    """A number as it is typed, or the beginning of a very long one.

    >>> short(10**100)
    '10000000000000000000... (101 characters)'
    """
    text = str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


def _no_text(value: Any) -> str:
    """Why a value, or an element of a list, cannot be written to a file; empty if it can."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            if "\0" in text:
                return "must be a text without the character NUL; leave it out"
            try:
                text.encode()
            except UnicodeEncodeError:
                return "must be UTF-8 text; type it in UTF-8, and rename a file that is named so"
    return ""


def no_effect(
    text: str, chosen: str, only_with: Sequence[str] = (), takes: Sequence[str] = ()
) -> str:
    """The problem of an option, typed as `text`, beside a choice that does not use it.

    `only_with` are the choices that may use it, `takes` the options that the chosen class has.

    >>> no_effect("corpus.path=/tmp", "stdlib", ("files", "custom"))
    'corpus.path=/tmp: has no effect with corpus=stdlib; add corpus=files, or leave it out'
    >>> no_effect("corpus.path=/tmp", "custom", ("files", "custom"), takes=["stanzas"])
    'corpus.path=/tmp: has no effect with corpus=custom, whose class has stanzas; leave it out'
    """
    group = text.lstrip("+").partition("=")[0].rpartition(".")[0]
    others = [name for name in only_with if name != "custom"] or only_with
    remedy = f"add {' or '.join(f'{group}={name}' for name in others)}, or leave it out"
    why = ""
    if not only_with or chosen in only_with:
        remedy, why = "leave it out", f", whose class has {', '.join(takes) or 'no options'}"
    return f"{text}: has no effect with {group}={chosen}{why}; {remedy}"


def dotted(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as dotted names; an empty mapping has none.

    >>> dotted({"seed": 0, "model": {"n_layer": 4}, "track": ["csv"]})
    {'seed': 0, 'model.n_layer': 4, 'track': ['csv']}
    """
    flat: dict[str, Any] = {}
    for name, value in node.items():
        inner = isinstance(value, Mapping)
        flat |= dotted(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def typed(value: Any) -> str:
    """A value as it is typed on the command line.

    >>> typed(None), typed(True), typed([1.0, 2])
    ('null', 'true', '[1.0,2]')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    return str(value)


@dataclass(frozen=True)
class Option:
    """An option as help and checks see it."""

    key: str  # as typed
    group: str
    kinds: tuple[Any, ...]  # the types that a value may have, NoneType among them for null
    default: Any
    facts: Facts

    @property
    def name(self) -> str:
        """The key without its group."""
        return self.key.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """The types in words, such as "a number or null"."""
        return " or ".join("null" if k is NoneType else KINDS[k] for k in self.kinds if k in NAMED)

    def problem(self, value: Any) -> str:
        """What is wrong with a value of any type; empty where it is right.

        A type that is not in KINDS is not checked.
        """
        known = self.kinds and NAMED.issuperset(self.kinds)
        if known and not any(is_a(value, kind) for kind in self.kinds):
            return f"{self.key}={typed(value)}: {self.needs(value)}"
        return value_problem(self.key, value, self.facts.allowed)

    def needs(self, value: Any) -> str:
        """Which type and values are allowed, for a value that has another type."""
        words = self.facts.allowed.words
        whole = int in self.kinds and isinstance(value, float) and abs(value) < LARGEST
        proposal = f"; type {int(value)}" if whole and value.is_integer() else ""
        if str in self.kinds and isinstance(value, Real):
            proposal = "; a text that looks like a number is written in quotes"
        if isinstance(value, str) and {list[str], list[Any]} & set(self.kinds):
            proposal = f"; type {self.key}=[{value}]"
        return f"must be {self.kind}{f', {words}' if words else ''}{proposal}"


NAMED = {*KINDS, NoneType}


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has this type of KINDS: whole numbers are numbers, true and false are not.

    >>> is_a(1, float), is_a(True, float), is_a(1.0, int), is_a([["a"]], list[str])
    (True, False, False, False)
    """
    if kind in (list[str], list[float]):
        [element] = typing.get_args(kind)
        return isinstance(value, list) and all(is_a(each, element) for each in value)
    if kind in (int, float):
        number = Integral if kind is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(kind) or kind)


def described(cls: type[Any]) -> Iterator[Option]:
    """Every option of a group and of the groups below it, in the order of its fields."""
    for one, hint in _typed_fields(cls):
        if is_dataclass(hint):
            yield from described(typing.cast(type, hint))
        else:
            yield _option_of(one, hint, cls.key(one.name), cls.group)


def options_of(cls: type[Any], prefix: str) -> Iterator[Option]:
    """The fields of any dataclass as options, each typed as `prefix.field`."""
    for one, hint in _typed_fields(cls):
        if one.init:
            yield _option_of(one, hint, f"{prefix}.{one.name}", prefix)


def field_problems(cls: type[Any], values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A message for each field of a dataclass whose value has a wrong type or is not allowed.

    >>> @dataclass
    ... class Rule:
    ...     eta: float = option(1.0, "Server learning rate.", allowed=above(0))
    >>> list(field_problems(Rule, {"eta": -1}, "strategy"))
    ['strategy.eta=-1: must be above 0, or leave it out for the default, 1.0']
    """
    for one in options_of(cls, prefix):
        value = values.get(one.name, one.default)
        problem = "" if value is one.default else one.problem(value)
        if problem and one.default not in (None, "") and not problem.endswith("?"):
            problem += f", or leave it out for the default, {typed(one.default)}"
        if problem:
            yield problem


def _option_of(one: Field[Any], hint: Any, key: str, group: str) -> Option:
    default = one.default_factory() if callable(one.default_factory) else one.default
    default = None if default is MISSING else default
    return Option(key, group, _kinds(hint), default, facts_of(one))


def _typed_fields(cls: type[Any]) -> Iterator[tuple[Field[Any], Any]]:
    """The fields of a dataclass, each with its type."""
    hints = _hints(cls)
    return ((one, hints[one.name]) for one in fields(cls))


def _hints(cls: type[Any]) -> dict[str, Any]:
    """Field -> its type; where a type cannot be found, as its name is imported for type checkers
    only, the fields whose types are single words of KINDS still have theirs.
    """
    try:
        return typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError, SyntaxError):
        plain = {kind.__name__: kind for kind in (int, float, bool, str)}
        return {one.name: plain.get(str(one.type), one.type) for one in fields(cls)}


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have; none for a type that options have no words for."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return typing.get_args(hint)
    return (hint,) if hint in KINDS else ()
