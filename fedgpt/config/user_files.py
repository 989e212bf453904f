"""The files of a user's folder of groups (--config-dir): their mistakes, before Hydra reads them.

Hydra's own errors name neither the key nor the line, and some are tracebacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgpt.config.choices import CONF, YAML_ERRORS, not_yaml, read_choice, read_text
from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import OPTIONS
from fedgpt.core.options.option import dotted


def file_problems(config_dir: str, group: str, name: str) -> Iterator[str]:
    """The problems of a choice in the user's folder, and of the choices that it is built on."""
    found: dict[tuple[str, str], list[str]] = {}
    todo = [(group, name)]
    while todo:
        if (one := todo.pop()) in found:
            continue
        try:
            found[one], more = _problems(config_dir, *one)
            todo += more
        except ConfigError as error:
            found[one] = error.problems
    for problems in found.values():
        yield from problems


def _problems(config_dir: str, group: str, name: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The problems of one file, and the (group, choice) pairs that it is built on."""
    path = Path(config_dir) / group / f"{name}.yaml"
    if path.is_dir():
        return [f"{path}: is a folder; a choice is a file"], []
    if not path.is_file():
        return [], []
    if (CONF / group / path.name).is_file():
        return [f"{path}: fedgpt has {group}={name} of its own; give this file another name"], []
    choice = read_choice(group, name, config_dir)
    values = _values(path)
    built_on = [pair for line in values.pop("defaults", []) for pair in _named(group, line)]
    options = dotted(values, "" if choice.anywhere else f"{group}.")
    problems = [problem for key, value in options.items() if (problem := _problem(key, value))]
    return [f"{path}: {problem}" for problem in problems], built_on


def _values(path: Path) -> dict[str, Any]:
    """The values of a file as Hydra reads it, which refuses a key that stands there twice."""
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(read_text(path)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.msg or error}") from error
    except YAML_ERRORS as error:
        raise not_yaml(path, error) from error
    return values or {}


def _named(group: str, line: Any) -> Iterator[tuple[str, str]]:
    """The choices that a line of a defaults list names; such as `nano` and `/local: reset`."""
    pairs = line.items() if isinstance(line, dict) else [(group, line)]
    for other, names in pairs:
        for name in names if isinstance(names, list) else [names]:
            yield str(other).rpartition(" ")[2].lstrip("/"), str(name)


def _problem(key: str, value: Any) -> str:
    """What is wrong with a value of a file; texts are compared here, as OmegaConf converts them."""
    if key.startswith(("hydra.", "strategy.")) or ".arguments." in key:
        return ""
    if key not in OPTIONS:
        return f"no option {key!r}{nearest(key, OPTIONS)}"
    one = OPTIONS[key]
    if not one.kinds or (isinstance(value, str) and str not in one.kinds) or value == "???":
        return ""  # a reference, or a number in quotes, which OmegaConf converts
    return one.problem(value) if str in one.kinds and "${" not in str(value) else ""
