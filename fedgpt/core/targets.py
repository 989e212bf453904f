"""Interchangeable parts: a built-in part is named by its file, any other part by its class.

    corpus=stdlib                              built in: the class in fedgpt/data/corpora/stdlib.py
    corpus=custom corpus._target_=mine.Poems   any class, where trusted_packages=[mine] allows it

The built-in members are the files of a folder; no other file lists them. Importing a module runs
its code, and a configuration may come from an untrusted source. So a class is imported only from an
allow-list: the folder and the packages in trusted_packages.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeVar

from fedgpt.core.errors import ConfigError, nearest

CUSTOM = "custom"  # the choice under which `_target_` names the class
INTERFACE = "base"  # the module of a folder that defines what its members inherit

Part = TypeVar("Part")


def build(option: str, node: Any, rooms: Iterable[str] = (), trusted: Iterable[str] = ()) -> Any:
    """Return the object that `node` describes: its `_target_` class called with the other keys.

    `option` is the name of the node in messages. Only classes inside the packages `rooms` and
    `trusted` are imported. Raises ConfigError.

    >>> build("share", {"_target_": "fractions.Fraction", "numerator": 3}, trusted=["fractions"])
    Fraction(3, 1)
    """
    if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
        raise ConfigError(
            f"{option}={node!r}: a {option} needs `_target_`, the full name of its class"
        )
    cls = load_class(option, node["_target_"], rooms, trusted)
    return call(option, cls, {key: value for key, value in node.items() if key != "_target_"})


def load_class(
    option: str, target: str, rooms: Iterable[str] = (), trusted: Iterable[str] = ()
) -> type:
    """Import the class `target`, written package.module.Class; raises ConfigError."""
    allowed = (*rooms, *trusted)
    if not any(target.startswith(f"{package}.") for package in allowed):
        raise ConfigError(
            f"{option}._target_={target}: only classes in {', '.join(allowed)} are used; "
            f"to trust another package add trusted_packages=[{target.split('.', maxsplit=1)[0]}]"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{option}._target_={target}: cannot import {module_name} ({error})"
        ) from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        names = [name for name, member in vars(module).items() if inspect.isclass(member)]
        raise ConfigError(
            f"{option}._target_={target}: {module_name} has no class"
            f" {class_name}{nearest(class_name, names)}"
        )
    return cls


def call(option: str, cls: type, arguments: Mapping[str, Any]) -> Any:
    """Return `cls(**arguments)`; raises ConfigError that names each argument `option.<name>`."""
    known = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not takes_any and (unknown := [name for name in arguments if name not in known]):
        allowed = ", ".join(known) or "none"
        raise ConfigError(
            f"{option}.{name}={arguments[name]}: the options of {cls.__name__} are"
            f" {allowed}{nearest(name, known)}"
            for name in unknown
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{option}: {cls.__name__} refused its options: {error}") from error


def arguments_of(group: str, arguments: Any) -> Mapping[str, Any]:
    """Return `arguments`, null as none; raises ConfigError where they are no mapping."""
    if not isinstance(arguments, Mapping | None):
        raise ConfigError(
            f"{group}.arguments={arguments}: must be names and values, such as"
            f" '{group}.arguments={{name: 1}}'"
        )
    return arguments or {}


def custom_class(
    group: str, base: type[Part], target: str | None, packages: Iterable[str]
) -> type[Part]:
    """Import the class `target` of `group=custom`, which must lie in one of the packages and
    inherit from `base`; raises ConfigError.
    """
    if target is None:
        raise ConfigError(
            f"{group}._target_ is not set: {group}={CUSTOM} needs the full name of a class,"
            f" {group}._target_=package.module.Class"
        )
    cls = load_class(group, str(target), packages)
    interface = f"{base.__module__}.{base.__name__}"
    if not issubclass(cls, base):
        raise ConfigError(f"{group}._target_={target}: must inherit from {interface}")
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise ConfigError(
            f"{group}._target_={target}: must define {' and '.join(missing)}, as {interface} says"
        )
    return cls


class Chosen(Protocol):
    """The options of a group: a dataclass with the member's name and these two fields."""

    _target_: str | None
    arguments: Any  # name -> value, or None


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
        return self.base.__module__.rpartition(".")[0]

    def names(self) -> list[str]:
        """Names of the built-in members, in alphabetical order."""
        path = importlib.import_module(self.folder).__path__
        return sorted(m.name for m in pkgutil.iter_modules(path) if m.name != INTERFACE)

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
        arguments = arguments_of(self.group, options.arguments)
        if self.name_of(options) == CUSTOM:
            cls = custom_class(self.group, self.base, options._target_, (self.folder, *trusted))
        elif options._target_ is not None:
            raise ConfigError(
                f"{self.group}._target_={options._target_}: {self.group}={self.name_of(options)}"
                f" has a class of its own; add {self.group}={CUSTOM}, or leave it out"
            )
        else:
            cls = self.load(self.name_of(options))
        values, problems = self._values(cls, options)
        try:
            part = call(f"{self.group}.arguments", cls, {**values, **arguments})
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from error
        if problems:
            raise ConfigError(problems)
        return part

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
        """Return the options that are passed to the class, and the problems of the others."""
        known, name = inspect.signature(cls).parameters, self.name_of(options)
        typed = [one for one in fields(options) if one.name not in ("_target_", "arguments")]
        values = {one.name: getattr(options, one.name) for one in typed}
        optional = {one.name for one in typed if one.default is None}
        given = {key: value for key, value in values.items() if value is not None}
        has = f"it has {', '.join(known)}" if known else "it has none"
        problems = [
            f"{self.group}.{key}={value}: no option of {self.key}={name}; {has}"
            for key, value in given.items()
            if key in optional and key not in known
        ]
        own = set(given) & optional if name == CUSTOM else set(values)
        problems += [
            f"{self.group}.arguments.{key}={value}: is an option of its own; type"
            f" {self.group}.{key}={value}"
            for key, value in (options.arguments or {}).items()
            if key in own
        ]
        return {key: given[key] for key in given if key in own and key in known}, problems
