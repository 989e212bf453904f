"""Classes that a configuration names by `_target_`: their import, construction and errors.

Importing a module runs its code, and a configuration may come from an untrusted source. So a class
is imported only from an allow-list: the built-in packages, and those in trusted_packages.

A class of another package may raise any exception when it is imported, built or called. Each of
them becomes a ConfigError that names the option, the class and the exception. The exception is its
cause, and the traceback is logged at level debug (HYDRA_FULL_ERROR=1 prints it).
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedgpt.core.device import out_of_memory
from fedgpt.core.errors import ConfigError, FedGPTError, nearest
from fedgpt.core.files import sha256_of
from fedgpt.core.options.option import field_problems

CUSTOM = "custom"  # the choice under which `_target_` names the class
PACKAGE = Path(__file__).parents[1]
TRACEBACK = "HYDRA_FULL_ERROR=1 prints the traceback"
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


def source_digest(target: str) -> str:
    """First digits of the sha256 of the file with the class `target`; empty if there is none."""
    spec = importlib.util.find_spec(target.rpartition(".")[0])
    file = Path(spec.origin or "") if spec is not None else Path()
    return sha256_of(file)[:16] if file.is_file() else ""


def call(
    option: str, cls: type, arguments: Mapping[str, Any], others: Mapping[str, Any] | None = None
) -> Any:
    """Return `cls(**others, **arguments)`; raises ConfigError that names `option.<argument>`.

    `others` are options of a group, whose types are checked already.
    """
    known = parameters_of(cls)
    if known is not None and (unknown := [name for name in arguments if name not in known]):
        allowed = ", ".join(known) or "none"
        raise ConfigError(
            f"{option}.{name}={arguments[name]}: the options of {cls.__name__} are"
            f" {allowed}{nearest(name, known)}"
            for name in unknown
        )
    if is_dataclass(cls) and (problems := list(field_problems(cls, arguments, option))):
        raise ConfigError(problems)
    try:
        return cls(**(others or {}), **arguments)
    except FedGPTError:
        raise
    except (TypeError, ValueError) as error:
        log.debug("%s: %s refused its options", option, cls.__name__, exc_info=error)
        raise ConfigError(f"{option}: {cls.__name__} refused its options: {error}") from error
    except Exception as error:
        problem = f"{option}: {cls.__name__} raised {error_text(error)}; {TRACEBACK}"
        log.debug("%s", problem, exc_info=error)
        raise ConfigError(problem) from error


@contextmanager
def calling(
    group: str, part: object, method: str, passes: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Convert an exception of a third-party class in this block to a ConfigError.

    The message names `method`. A FedGPTError is not converted, nor are the exceptions in `passes`,
    those of built-in classes, which are errors of this package, and those for lack of memory.
    """
    try:
        yield
    except (FedGPTError, *passes):
        raise
    except Exception as error:
        if is_built_in(type(part)) or out_of_memory(error):
            raise
        problem = f"{typed_class(group, part)}: {method} raised {error_text(error)}; {TRACEBACK}"
        log.debug("%s", problem, exc_info=error)
        raise ConfigError(problem) from error


def problems_of(group: str, part: Any, *arguments: Any) -> list[str]:
    """Return the messages of `part.problems(*arguments)`; an exception of it is a message, too."""
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


def error_text(error: BaseException) -> str:
    """Return the type and the text of an exception, and the last line of a user's file behind it.

    >>> error_text(KeyError("length"))
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


def custom_class(
    group: str,
    base: type[Part] | tuple[type[Part], ...],
    target: str | None,
    packages: Iterable[str],
) -> type[Part]:
    """Import the class `target` of one of the packages, which must inherit from `base`.

    The class must define the abstract methods, and the class variables that `base` only declares.
    `base` may be a tuple, of which one is enough. Raises ConfigError.
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


def _cannot_import(typed: str, module: str, error: BaseException) -> ConfigError:
    log.debug("%s: cannot import %s", typed, module, exc_info=error)
    absent = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
    what, remedy = error_text(error), TRACEBACK
    if absent:
        what, remedy = str(error), "add its folder to PYTHONPATH"
    return ConfigError(f"{typed}: cannot import {module} ({what}); {remedy}")


def parameters_of(cls: type) -> list[str] | None:
    """Return the names of the arguments of a class; None if it accepts any, or they are unknown."""
    try:
        known = inspect.signature(cls).parameters
    except (TypeError, ValueError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in known.values()) else list(known)


def _undefined(cls: type) -> list[str]:
    """Return the class variables that an interface of this package declares but `cls` lacks."""
    declared = [
        name
        for base in cls.__mro__
        if is_built_in(base)
        for name, kind in inspect.get_annotations(base).items()
        if str(kind).startswith("ClassVar")
    ]
    own = [one.name for one in fields(cls)] if is_dataclass(cls) else []
    return sorted({name for name in declared if not hasattr(cls, name) and name not in own})
