"""Interchangeable parts: a built-in part is named by its file, any other part by its class.

    corpus=stdlib                              built in: the class in fedgpt/data/corpora/stdlib.py
    corpus=custom corpus._target_=mine.Poems   any class, where trusted_packages=[mine] allows it

The built-in members are the files of a folder; no other file lists them. Importing a module runs
its code, and a configuration may come from an untrusted source. So a class is imported only from an
allow-list: the folder and the packages in trusted_packages.

A class of another package may raise any exception when it is imported, built or called. Each of
them becomes a ConfigError that names the option, the class and the exception. The exception is its
cause, and the traceback is logged at level debug (HYDRA_FULL_ERROR=1 prints it).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from fedgpt.core.errors import ConfigError, FedGPTError, nearest
from fedgpt.core.options.option import KINDS, facts_of, no_effect

CUSTOM = "custom"  # the choice under which `_target_` names the class
INTERFACE = "base"  # the module of a folder that defines what its members inherit
PACKAGE = Path(__file__).parents[1]
TRACEBACK = "HYDRA_FULL_ERROR=1 prints the traceback"
# annotations of a field whose values are checked -> the type of such a value, and its words
SIMPLE = {
    "int": (Integral, KINDS[int]),
    "float": (Real, KINDS[float]),
    "bool": (bool, KINDS[bool]),
    "str": (str, KINDS[str]),
    "None": (NoneType, "null"),
}
log = logging.getLogger(__name__)

Part = TypeVar("Part")


def build(option: str, node: Any, packages: Iterable[str] = (), trusted: Iterable[str] = ()) -> Any:
    """Return the object that `node` describes: its `_target_` class called with the other keys.

    `option` is the name under which messages speak of the node. Only classes inside `packages` and
    the `trusted` packages are imported. Raises ConfigError.

    >>> build("share", {"_target_": "fractions.Fraction", "numerator": 3}, trusted=["fractions"])
    Fraction(3, 1)
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(
            f"{option}={node!r}: a {option} needs `_target_`, the full name of its class"
        )
    cls = load_class(option, node["_target_"], packages, trusted)
    return call(option, cls, {key: value for key, value in node.items() if key != "_target_"})


def load_class(
    option: str, target: str, packages: Iterable[str] = (), trusted: Iterable[str] = ()
) -> type:
    """Import the class `target`, written package.module.Class; raises ConfigError."""
    typed, allowed, words = f"{option}._target_={target}", (*packages, *trusted), target.split(".")
    if len(words) < 2 or not all(word.isidentifier() for word in words):
        raise ConfigError(
            f"{typed}: must be the full name of a class, such as my_package.my_module.Mine"
        )
    if not any(target.startswith(f"{package}.") for package in allowed):
        raise ConfigError(
            f"{typed}: only classes in {', '.join(allowed)} are used; to trust another package add"
            f" trusted_packages=[{words[0]}]"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
        cls = getattr(module, class_name, None)
    except (Exception, SystemExit) as error:
        raise _cannot_import(typed, module_name, error) from error
    if not inspect.isclass(cls):
        names = [name for name, member in vars(module).items() if inspect.isclass(member)]
        raise ConfigError(
            f"{typed}: {module_name} has no class {class_name}{nearest(class_name, names)}"
        )
    return cls


def call(
    option: str, cls: type, arguments: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> Any:
    """Return `cls(**others, **arguments)`; raises ConfigError that names `option.<argument>`.

    `others` are options of a group, whose types are checked already.
    """
    known = _parameters(cls)
    if known is not None and (unknown := [name for name in arguments if name not in known]):
        allowed = ", ".join(known) or "none"
        raise ConfigError(
            f"{option}.{name}={arguments[name]}: the options of {cls.__name__} are"
            f" {allowed}{nearest(name, known)}"
            for name in unknown
        )
    if problems := list(_wrong_types(option, cls, arguments)):
        raise ConfigError(problems)
    try:
        return cls(**(others or {}), **arguments)
    except FedGPTError:
        raise
    except (TypeError, ValueError) as error:
        log.debug("%s: %s refused its options", option, cls.__name__, exc_info=error)
        raise ConfigError(f"{option}: {cls.__name__} refused its options: {error}") from error
    except Exception as error:
        problem = f"{option}: {cls.__name__} raised {described(error)}; {TRACEBACK}"
        log.debug("%s", problem, exc_info=error)
        raise ConfigError(problem) from error


@contextmanager
def calling(
    group: str, part: object, method: str, passes: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Within it, an exception of a class from outside becomes a ConfigError that names `method`.

    A FedGPTError passes as it is, and so do the exceptions in `passes` and those of built-in
    classes, which are mistakes of this package.
    """
    try:
        yield
    except (FedGPTError, *passes):
        raise
    except Exception as error:
        if is_built_in(type(part)):
            raise
        problem = f"{typed_class(group, part)}: {method} raised {described(error)}; {TRACEBACK}"
        log.debug("%s", problem, exc_info=error)
        raise ConfigError(problem) from error


def problems_of(group: str, part: Any, *arguments: Any) -> list[str]:
    """Return what `part.problems(*arguments)` yields; that it raises instead is a problem, too."""
    try:
        with calling(group, part, "problems"):
            return list(part.problems(*arguments))
    except ConfigError as error:
        return error.problems


def typed_class(group: str, part: object) -> str:
    """Return the class of a part as the option that names it.

    >>> from fractions import Fraction
    >>> typed_class("share", Fraction(1, 3))
    'share._target_=fractions.Fraction'
    """
    return f"{group}._target_={type(part).__module__}.{type(part).__qualname__}"


def is_built_in(cls: type) -> bool:
    """Whether a class is defined in this package."""
    return cls.__module__.startswith(f"{PACKAGE.name}.")


def described(error: BaseException) -> str:
    """Return the type and the text of an exception, and the last line of a user's file behind it.

    >>> described(KeyError("length"))
    "KeyError: 'length'"
    """
    text = str(error).strip().partition("\n")[0]
    theirs = (PACKAGE, Path(sysconfig.get_path("stdlib")), Path(sys.prefix))
    files = [
        (Path(frame.filename), frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
    ]
    own = [place for place in files if not any(map(place[0].is_relative_to, theirs))]
    place = f" ({own[-1][0].name}, line {own[-1][1]})" if own else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}"


def arguments_of(group: str, arguments: Any) -> Mapping[str, Any]:
    """Return `arguments`, null as none; raises ConfigError where they are no mapping."""
    if not isinstance(arguments, Mapping | None):
        raise ConfigError(
            f"{group}.arguments={arguments}: must be names and values, such as"
            f" '{group}.arguments={{name: 1}}'"
        )
    return arguments or {}


def custom_class(
    group: str,
    base: type[Part] | tuple[type[Part], ...],
    target: str | None,
    packages: Iterable[str],
) -> type[Part]:
    """Import the class `target`, which must lie in one of the packages, inherit from `base` (one of
    several) and be complete; raises ConfigError.

    Complete is a class that defines the abstract methods and the names that `base` only declares.
    """
    if target is None:
        raise ConfigError(
            f"{group}._target_ is not set: {group}={CUSTOM} needs the full name of a class,"
            f" {group}._target_=package.module.Class"
        )
    cls = load_class(group, str(target), packages)
    bases = base if isinstance(base, tuple) else (base,)
    interface = " or ".join(f"{one.__module__}.{one.__name__}" for one in bases)
    if not issubclass(cls, bases):
        raise ConfigError(f"{group}._target_={target}: must inherit from {interface}")
    if missing := [*sorted(getattr(cls, "__abstractmethods__", ())), *_undefined(cls)]:
        raise ConfigError(
            f"{group}._target_={target}: must define {' and '.join(missing)}, as {interface} says"
        )
    return cls


def package_of(base: type) -> str:
    """Return the package of an interface, which is the folder of its built-in members."""
    return base.__module__.rpartition(".")[0]


def modules_in(folder: str) -> list[str]:
    """Return the names of the built-in members of a folder of this package, without importing it.

    >>> modules_in("fedgpt.evaluate.metrics")
    ['accuracy']
    """
    path = PACKAGE.joinpath(*folder.split(".")[1:])
    return sorted(m.name for m in pkgutil.iter_modules([str(path)]) if m.name != INTERFACE)


def _cannot_import(typed: str, module: str, error: BaseException) -> ConfigError:
    log.debug("%s: cannot import %s", typed, module, exc_info=error)
    absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
    what, remedy = described(error), TRACEBACK
    if absent:
        what, remedy = str(error), "name the folder that it is in in PYTHONPATH"
    return ConfigError(f"{typed}: cannot import {module} ({what}); {remedy}")


def _parameters(cls: type) -> list[str] | None:
    """Return the names of the arguments of a class; None where it takes any, or does not tell."""
    try:
        known = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else list(known)


def _wrong_types(option: str, cls: type, arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for each argument that has not the type which its field is annotated with.

    Only the types in SIMPLE and unions of them are checked. Strategies check their own fields, with
    ranges.
    """
    strategies = f"{PACKAGE.name}.aggregate."
    if not is_dataclass(cls) or any(c.__module__.startswith(strategies) for c in cls.__mro__):
        return
    for one in fields(cls):
        text = one.type if isinstance(one.type, str) else getattr(one.type, "__name__", one.type)
        names = [name.strip() for name in str(text).split("|")]
        value = arguments.get(one.name, one.default)
        if one.name not in arguments or value is one.default or not SIMPLE.keys() >= {*names}:
            continue
        if not any(_is_a(value, name) for name in names):
            words = " or ".join(SIMPLE[name][1] for name in names)
            yield f"{option}.{one.name}={value}: must be {words}"


def _is_a(value: Any, name: str) -> bool:
    """Whether a value has a type of SIMPLE; true and false are no numbers."""
    return isinstance(value, SIMPLE[name][0]) and (name == "bool" or not isinstance(value, bool))


def _undefined(cls: type) -> list[str]:
    """Return the class variables that an interface of this package declares and nobody defines."""
    declared = [
        name
        for base in cls.__mro__
        if is_built_in(base)
        for name, kind in inspect.get_annotations(base).items()
        if str(kind).startswith("ClassVar")
    ]
    own = [one.name for one in fields(cls)] if is_dataclass(cls) else []
    return sorted({name for name in declared if not hasattr(cls, name) and name not in own})


class Chosen(Protocol):
    """The options of a group: a dataclass with the member's name and these two fields."""

    _target_: str | None
    arguments: Any  # name -> value, or None


class Listed(NamedTuple, Generic[Part]):
    """A member that a list names."""

    name: str  # of a built-in member, or the full name of a class
    part: Part


@dataclass(frozen=True)
class Members(Generic[Part]):
    """The parts that a group of options chooses from: every file of a folder, and trusted classes.

    An option of the group is passed to a built-in member that has an argument of that name. An
    option whose default is null is passed to every member if it is set. A member without such an
    argument raises an error, so that no typed option is ignored.
    """

    group: str  # the group of options, e.g. corpus
    key: str  # the option that names a member, e.g. corpus.name
    base: type[Part]  # what a member inherits; its package is the folder

    @property
    def folder(self) -> str:
        """The package whose modules are the built-in members."""
        return package_of(self.base)

    @property
    def interface(self) -> type[Part] | tuple[type[Part], ...]:
        """What a class from outside inherits: `base`, or one of several classes below it."""
        return self.base

    def names(self) -> list[str]:
        """Names of the built-in members, in alphabetical order."""
        return modules_in(self.folder)

    def load(self, name: str) -> type[Part]:
        """Import the class of the built-in member `name`; raises ConfigError for another name."""
        known = self.names()
        if name not in known:
            names = [*known, CUSTOM]
            raise ConfigError(
                f"{self.key}={name}: allowed are {', '.join(names)}{nearest(name, names)}"
            )
        module = importlib.import_module(f"{self.folder}.{name}")
        found = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, self.base)
            and value.__module__ == module.__name__
        ]
        assert len(found) == 1, f"{module.__name__} must define one {self.base.__name__}"
        return found[0]

    def build(self, options: Chosen, trusted: Iterable[str] = ()) -> Part:
        """Return the member that `options` choose; raises ConfigError."""
        arguments, name = arguments_of(self.group, options.arguments), self.name_of(options)
        if name == CUSTOM:
            cls = self._custom(options._target_, trusted)
        elif options._target_ is not None:
            raise ConfigError(
                f"{self.group}._target_={options._target_}: {self.group}={name} has a class of its"
                f" own; add {self.group}={CUSTOM}, or leave it out"
            )
        else:
            cls = self.load(name)
        values, problems = self._values(cls, options)
        try:
            part = call(f"{self.group}.arguments", cls, arguments, values)
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
        if problems:
            raise ConfigError(problems)
        return part

    def build_list(self, entries: Iterable[Any], trusted: Iterable[str] = ()) -> list[Listed[Part]]:
        """Return the members of a list such as `track=[csv,{_target_:mine.Chart,color:red}]`.

        Raises ConfigError with what is wrong with any of the entries.
        """
        built: list[Listed[Part]] = []
        seen, errors = [], []
        for entry in entries:
            try:
                if entry in seen:
                    raise ConfigError(
                        f"{self.key}={entry}: stands twice in the list; leave one out"
                    )
                seen.append(entry)
                built.append(self._listed(entry, trusted))
            except ConfigError as error:
                errors.append(error)
        if errors:
            raise ConfigError(p for error in errors for p in error.problems) from errors[0]
        return built

    def problems(self, options: Chosen, trusted: Iterable[str] = ()) -> list[str]:
        """Return the problems for which `build` would raise ConfigError; empty if there are
        none.
        """
        try:
            self.build(options, trusted)
        except ConfigError as error:
            return error.problems
        return []

    def name_of(self, options: Chosen) -> str:
        """Return the member's name that `options` choose."""
        return getattr(options, self.key.rpartition(".")[2])

    def _values(self, cls: type, options: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the options that are passed to the class, and what is wrong with the others."""
        known, name = _parameters(cls), self.name_of(options)
        typed = [one for one in fields(options) if one.name not in ("_target_", "arguments")]
        values = {one.name: getattr(options, one.name) for one in typed}
        optional = {one.name: facts_of(one) for one in typed if one.default is None}
        given = {key: value for key, value in values.items() if value is not None}
        taken = given if known is None else {key: given[key] for key in given if key in known}
        problems = [
            no_effect(f"{self.group}.{key}={value}", name, optional[key].only_with, known or ())
            for key, value in given.items()
            if key in optional and key not in taken
        ]
        own = set(given) & set(optional) if name == CUSTOM else set(values)
        arguments = options.arguments or {}
        problems += [
            f"{self.group}.arguments.{key}={value}: is an option of its own; type"
            f" {self.group}.{key}={value}"
            for key, value in arguments.items()
            if key in own
        ]
        return {key: taken[key] for key in taken if key in own - set(arguments)}, problems

    def _custom(self, target: str | None, trusted: Iterable[str]) -> type[Part]:
        """Import a class from the folder or a trusted package."""
        return custom_class(self.group, self.interface, target, (self.folder, *trusted))

    def _listed(self, entry: Any, trusted: Iterable[str]) -> Listed[Part]:
        """Return the member of one entry of a list."""
        if isinstance(entry, Mapping) and isinstance(target := entry.get("_target_"), str):
            arguments = {key: value for key, value in entry.items() if key != "_target_"}
            return Listed(target, call(self.group, self._custom(target, trusted), arguments))
        if entry in (known := self.names()):
            return Listed(entry, call(self.group, self.load(entry), {}))
        raise ConfigError(
            f"{self.key}=[{entry}]: allowed are {', '.join(known)}, or"
            f" {{_target_:package.module.Class}}{nearest(str(entry), known)}"
        )
