"""The groups of conf/ and their choices, read from the files.

This module does not import Hydra, because that would delay help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import yaml

from fedgpt.core.errors import ConfigError
from fedgpt.core.options.option import dotted

MOST_VALUES = 10_000  # of a file, each alias written out; the files of fedgpt have about 20
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
    anywhere: bool  # whether its keys are those of all options, not of its group


def groups(config_dir: str | None = None) -> dict[str, list[str]]:
    """Group -> its choices, the default first; from conf/ and from a user's folder.

    The order is that of run.yaml, so that related groups are adjacent.
    """
    found: dict[str, list[str]] = {group: [] for group in defaults()}
    for root in [CONF, *([Path(config_dir)] if config_dir else [])]:
        for path in _files(root):
            names = found.setdefault(path.parent.name, [])
            names += [path.stem] if path.stem not in names else []
    first = defaults()
    return {
        group: sorted(
            names, key=lambda name, group=group: (name != first.get(group), name == "custom")
        )
        for group, names in found.items()
    }


def _files(root: Path) -> list[Path]:
    """The files of a folder's groups; raises ConfigError if one of them cannot be listed."""
    try:  # not Path.glob, which leaves out what it cannot list
        folders = [group for group in root.iterdir() if group.is_dir()]
        inside = [path for folder in folders for path in folder.iterdir()]
        # lstat fails in a folder whose files may be listed but not opened
        return sorted(path for path in inside if path.suffix == ".yaml" and path.lstat())
    except (FileNotFoundError, NotADirectoryError):  # a wrong --config-dir is refused elsewhere
        return []
    except OSError as error:
        raise ConfigError(
            f"--config-dir {root}: {error.filename} cannot be read ({error.strerror})"
        ) from error


@cache
def defaults() -> dict[str, str | None]:
    """Group -> the choice in run.yaml, or None."""
    lines = yaml.safe_load((CONF / "run.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for line in lines if isinstance(line, dict) for pair in line.items()]
    return {group: choice for group, choice in pairs if " " not in group}


def read_choice(group: str, name: str, config_dir: str | None = None) -> Choice:
    """Read a choice of a user's folder or of fedgpt; raises ConfigError for a damaged file."""
    roots = [*([Path(config_dir)] if config_dir else []), CONF]
    path = next(path for root in roots if (path := root / group / f"{name}.yaml").is_file())
    text = read_text(path)
    values = _mapping(path, text)
    built_on = values.pop("defaults", [])
    anywhere = "@package _global_" in text.partition("\n")[0]
    return Choice(
        group=group,
        name=name,
        meaning=_first_comment(text),
        sets={
            **{key: value for line in built_on for key, value in _chosen(line)},
            **dotted(values, "" if anywhere else f"{group}."),
        },
        anywhere=anywhere,
    )


def read_text(path: Path) -> str:
    """The text of a file of options; raises ConfigError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


# what the YAML library raises: the others for numbers of thousands of digits, for days that are not
# in the calendar and for values that are nested too deeply
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def not_yaml(path: Path, error: Exception) -> ConfigError:
    """The error for a file whose text is not YAML; `error` has the line."""
    why = " ".join(str(error).split()).replace('"<unicode string>", ', "")
    return ConfigError(f"{path}: is not valid YAML ({why}); correct it")


def _mapping(path: Path, text: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise not_yaml(path, error) from error
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be options and their values, such as n_layer: 4")
    if not isinstance(values.get("defaults", []), list):
        raise ConfigError(f"{path}: defaults must be a list of choices, such as [nano]")
    if _size(values, {}) > MOST_VALUES:
        raise ConfigError(
            f"{path}: has more than {MOST_VALUES:,} values, or an alias of itself; a choice is a"
            " few options"
        )
    return values


def _size(node: Any, known: dict[int, float]) -> float:
    """Number of values in a node with each alias written out; without end for a loop."""
    if not isinstance(node, list | dict):
        return 1
    if id(node) not in known:
        known[id(node)] = inf  # while it is counted, so that a loop ends
        parts = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


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
