"""What one option is: its default, meaning, unit and allowed values, all in one dataclass field.

A group of options is a dataclass below `Group` whose fields are made by `option`. Everything else
reads the fields: Hydra the types and defaults, `problems` the allowed values, `fedgpt help` all of
it. So an option is written down once.

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
from types import NoneType
from typing import Any, ClassVar

from fedgpt.core.errors import nearest

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
    choices: tuple[str, ...] = ()  # all of them, where the option is one word of a few


ANYTHING = Allowed("", lambda value: True)


def at_least(low: float, unit: str = "", *, zero: str = "", or_zero: str = "") -> Allowed:
    """Numbers from `low`; `zero` says what 0 means, and `or_zero` allows 0 below `low`, too.

    >>> at_least(0, zero="off").words, at_least(1, or_zero="off").words
    ('at least 0 (0 = off)', 'at least 1, or 0 (off)')
    """
    words = " ".join(filter(None, (f"at least {low}", unit, zero and f"(0 = {zero})")))
    if or_zero:
        return Allowed(f"{words}, or 0 ({or_zero})", lambda value: value == 0 or value >= low)
    return Allowed(words, lambda value: value >= low)


def above(low: float, unit: str = "", *, most: float = inf, or_zero: str = "") -> Allowed:
    """Numbers above `low`, up to `most`; `or_zero` says what 0 means, where it is allowed.

    >>> above(0, "seconds").words, above(0, most=1).words
    ('above 0 seconds', 'above 0 and at most 1')
    """
    words = f"above {low}{f' {unit}' if unit else ''}"
    words += f" and at most {most}" if most < inf else ""
    words += f", or 0 ({or_zero})" if or_zero else ""
    return Allowed(words, lambda value: low < value <= most or (bool(or_zero) and value == 0))


def between(low: float, high: float) -> Allowed:
    """Numbers from `low` to `high`, both included."""
    return Allowed(f"from {low} to {high}", lambda value: low <= value <= high)


def share(of: str = "", *, zero: bool = True) -> Allowed:
    """A part of something: from 0, or above 0, to below 1."""
    words = f"from 0 to below 1{f' ({of})' if of else ''}"
    if not zero:
        return Allowed("between 0 and 1", lambda value: 0 < value < 1)
    return Allowed(words, lambda value: 0 <= value < 1)


def one_of(*choices: str) -> Allowed:
    """One word of a few.

    >>> one_of("auto", "fp32", "bf16").words
    'auto, fp32 or bf16'
    """
    words = " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
    return Allowed(words, choices.__contains__, choices)


@dataclass(frozen=True)
class Facts:
    """What `option` notes in the metadata of a field."""

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

    `help` is complete sentences that can be read alone; `only_with` names the choices of the
    option's own group beside which it has an effect (all, where it is empty). `built_in` is the
    package whose modules a list may name.
    """
    metadata = {"option": Facts(help, unit, allowed, only_with, built_in)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(*choices: str) -> Any:
    """The field that says which choice of its group was made; the first one is the default."""
    return option(
        choices[0],
        "The kind that was chosen. It is set by the choice of the group, not typed by itself.",
        allowed=one_of(*choices),
    )


def member(default: str) -> Any:
    """The field that names the chosen class of a group: core/targets.py knows which there are."""
    return option(
        default,
        "The kind that was chosen. It is set by the choice of the group, not typed by itself.",
    )


def target() -> Any:
    """The field `_target_` of a group whose classes may come from other packages."""
    return option(
        None,
        "Full name of a class of your own, such as my_package.Mine. Its package must be named in"
        " trusted_packages.",
        only_with=("custom",),
    )


def arguments() -> Any:
    """The field `arguments` beside `_target_`."""
    return option({}, "Arguments by name that the class is called with, such as {size: 3}.")


class Group:
    """A group of options: finds what is wrong with the values of its fields."""

    group: ClassVar[str] = ""  # as typed; empty for the options above the groups
    choice_field: ClassVar[str] = "name"  # the field that names the choice, where there is one
    reports_unused: ClassVar[bool] = False  # whether `rules` reports values that have no effect

    @classmethod
    def key(cls, name: str) -> str:
        """An option of this group, as it is typed."""
        return f"{cls.group}.{name}" if cls.group else name

    @property
    def chosen(self) -> str:
        """The choice that was made, or an empty text in a group that does not note it."""
        return str(getattr(self, self.choice_field, ""))

    def problems(self) -> Iterator[str]:
        """Everything that is wrong with the values, first one by one, then side by side."""
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
        """What is wrong with values side by side; a group overrides it."""
        yield from ()


def facts_of(one: Field[Any]) -> Facts:
    """What `option` noted of a field."""
    return one.metadata.get("option", Facts(""))


def value_problem(key: str, value: Any, allowed: Allowed) -> str:
    """What is wrong with one value, as typed and with what is allowed; empty where it is right."""
    if value is None:
        return ""  # null is a matter of the type
    if isinstance(value, float) and not isfinite(value):
        words = f", {allowed.words}" if allowed.words else ""
        return f"{key}={value}: must be a finite number{words}"
    if allowed.holds(value):
        return ""
    return f"{key}={value}: must be {allowed.words}{nearest(str(value), allowed.choices)}"


def no_effect(
    text: str, chosen: str, only_with: Sequence[str] = (), takes: Sequence[str] = ()
) -> str:
    """The problem of an option, typed as `text`, beside a choice that does not use it.

    `only_with` are the choices that may use it, `takes` the options that the chosen class has.

    >>> no_effect("corpus.path=/tmp", "stdlib", ("files", "custom"))
    'corpus.path=/tmp: does nothing with corpus=stdlib; add corpus=files, or leave it out'
    >>> no_effect("corpus.path=/tmp", "custom", ("files", "custom"), takes=["stanzas"])
    'corpus.path=/tmp: does nothing with corpus=custom, whose class has stanzas; leave it out'
    """
    group = text.lstrip("+").partition("=")[0].rpartition(".")[0]
    others = [name for name in only_with if name != "custom"] or only_with
    remedy = f"add {' or '.join(f'{group}={name}' for name in others)}, or leave it out"
    why = ""
    if not only_with or chosen in only_with:
        remedy, why = "leave it out", f", whose class has {', '.join(takes) or 'no options'}"
    return f"{text}: does nothing with {group}={chosen}{why}; {remedy}"


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


@dataclass(frozen=True)
class Option:
    """An option as help and checks see it."""

    key: str  # as typed
    group: str
    kinds: tuple[Any, ...]  # the types that a value may have, NoneType among them for null
    default: Any
    facts: Facts

    @property
    def kind(self) -> str:
        """The types in words, such as "a number or null"."""
        return " or ".join("null" if k is NoneType else KINDS[k] for k in self.kinds if k in NAMED)


NAMED = {*KINDS, NoneType}


def described(cls: type) -> Iterator[Option]:
    """Every option of a group and of the groups below it, in the order of its fields."""
    hints = typing.get_type_hints(cls)
    for one in fields(cls):  # pyright: ignore[reportArgumentType]  # groups are dataclasses
        hint = hints[one.name]
        if is_dataclass(hint):
            yield from described(typing.cast(type, hint))
            continue
        default = one.default_factory() if callable(one.default_factory) else one.default
        yield Option(
            key=cls.key(one.name),  # pyright: ignore[reportAttributeAccessIssue]  # as above
            group=cls.group,  # pyright: ignore[reportAttributeAccessIssue]
            kinds=(hint,) if hint in KINDS else typing.get_args(hint),
            default=None if default is MISSING else default,
            facts=facts_of(one),
        )
