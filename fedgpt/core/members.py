"""Groups of interchangeable parts: built-in members are the files of a folder.

    corpus=stdlib                              built in: the class in fedgpt/data/corpora/stdlib.py
    corpus=custom corpus._target_=mine.Poems   any class, where trusted_packages=[mine] allows it

The folder is the list of built-in members; no other file lists them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options.option import facts_of, no_effect
from fedgpt.core.targets import CUSTOM, PACKAGE, call, custom_class, parameters_of

INTERFACE = "base"  # name of the module with the interface in a folder of members

Part = TypeVar("Part")


def arguments_of(group: str, arguments: Any) -> Mapping[str, Any]:
    """Return `arguments`, and none for null; raises ConfigError if they are not a mapping."""
    if not isinstance(arguments, Mapping | None):
        raise ConfigError(
            f"{group}.arguments={arguments}: must be names and values, such as"
            f" '{group}.arguments={{name: 1}}'"
        )
    return arguments or {}


def modules_in(folder: str) -> list[str]:
    """Return the names of the built-in members of a folder of this package, without importing it.

    >>> modules_in("fedgpt.evaluate.metrics")
    ['accuracy']
    """
    path = PACKAGE.joinpath(*folder.split(".")[1:])
    return sorted(m.name for m in pkgutil.iter_modules([str(path)]) if m.name != INTERFACE)


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
        return self.base.__module__.rpartition(".")[0]

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
        known, name = parameters_of(cls), self.name_of(options)
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
