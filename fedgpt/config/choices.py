"""The groups of conf/ and their choices, read from the files.

This module does not import Hydra, because that would delay help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fedgpt.core.errors import ConfigError
from fedgpt.core.options.option import dotted

PACKAGE = Path(__file__).parents[1]
# in a wheel conf/ is inside the package, in a clone next to it
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"


@dataclass(frozen=True)
class Choice:
    """One file of a group: `meaning` is its first comment, `sets` maps typed options to values."""

    group: str
    name: str
    meaning: str
    sets: dict[str, Any]


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Group -> its choices, the default first; from conf/ and from a user's folder.

    The order is that of run.yaml, so that related groups are adjacent.
    """
    found: dict[str, list[str]] = {group: [] for group in defaults()}
    for root in [CONF, *([Path(config_dir)] if config_dir else [])]:
        for path in sorted(root.glob("*/*.yaml")):
            names = found.setdefault(path.parent.name, [])
            names += [path.stem] if path.stem not in names else []
    first = defaults()
    return {
        group: sorted(
            names, key=lambda name, group=group: (name != first.get(group), name == "custom")
        )
        for group, names in found.items()
    }


@cache
def defaults() -> dict[str, str | None]:
    """Group -> the choice in run.yaml, or None."""
    lines = yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for line in lines if isinstance(line, dict) for pair in line.items()]
    return {group: choice for group, choice in pairs if " " not in group}


def read_choice(group: str, name: str, config_dir: str | None = None) -> Choice:
    """Read a choice; a user's file takes precedence over fedgpt's."""
    roots = [*([Path(config_dir)] if config_dir else []), CONF]
    path = next(path for root in roots if (path := root / group / f"{name}.yaml").is_file())
    text = _text(path)
    values = _mapping(path, text)
    anywhere = "@package _global_" in text.partition("\n")[0]
    return Choice(
        group=group,
        name=name,
        meaning=_first_comment(text),
        sets={
            **{key: value for line in values.pop("defaults", []) for key, value in _chosen(line)},
            **dotted(values, "" if anywhere else f"{group}."),
        },
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{path}: is no YAML ({why}); correct it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be options and their values, such as n_layer: 4")
    return values


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines += [line.lstrip("# ")] if "@package" not in line else []
    return " ".join(lines)


def _chosen(line: Any) -> Iterator[tuple[str, Any]]:
    """The choice of another group in a line of a defaults list."""
    for key, value in line.items() if isinstance(line, dict) else ():
        yield key.removeprefix("override ").lstrip("/"), value
