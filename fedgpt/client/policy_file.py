"""Reads a site's policy from its YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from fedgpt.client.policy import Policy, PrivacyLimits
from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.files import typed_path
from fedgpt.core.options import CorpusOptions
from fedgpt.core.options.option import Option, options_of, typed

# options of corpus=files that a site sets for its own text
TEXT = ("path", "text_field", "label_field", "bad_records", "document_bytes")
MOST_BYTES = 1 << 20  # of a policy file


def read_policy(path: str | Path) -> Policy:
    """The policy in a YAML file.

    Raises ConfigError with all problems, each with the file, the key, its value and what is
    allowed.
    """
    try:
        file = typed_path(path)
        with file.open("rb") as stream:
            text = stream.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ConfigError(f"{path}: has more than {MOST_BYTES:,} bytes, which no policy has")
        values = _loaded(text.decode("utf-8"))
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home folder
        reason = getattr(error, "strerror", None) or "there is no such home folder"
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split()).replace('"<unicode string>", ', "")
        raise ConfigError(f"{path}: is not valid YAML ({why}); correct it") from None
    read = _Reader(str(path))
    top, inner = read.section(values, "", _options(Policy, ""), ("text", "privacy"))
    text_options = _options(CorpusOptions, "text.")
    own = {name: text_options[name] for name in TEXT}
    of_text, _ = read.section(inner.get("text", {}), "text.", own)
    of_privacy, _ = read.section(
        inner.get("privacy", {}), "privacy.", _options(PrivacyLimits, "privacy.")
    )
    if not read.problems:
        read.combined(of_privacy)
    if read.problems:
        raise ConfigError(read.problems)
    text_of_site = CorpusOptions(name="files", client="file", **of_text)
    return Policy(**top, text=text_of_site, privacy=PrivacyLimits(**of_privacy))


class _Reader:
    """Reads the sections of a policy file, and collects what is wrong with them."""

    def __init__(self, file: str):
        self.file, self.problems = file, list[str]()

    def section(
        self, values: Any, prefix: str, known: Mapping[str, Option], inner: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the values of the keys in `known`, those of the `inner` sections)."""
        if values is None and not prefix:
            return {}, {}  # an empty file: no limits
        if not isinstance(values, dict):
            where = f"{prefix.rstrip('.')}: " if prefix else ""
            self._wrong(f"{where}must be keys and their values, such as {next(iter(known))}: ...")
            return {}, {}
        found: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known and key not in inner:
                names = (*known, *inner)
                allowed = nearest(str(key), names) or f"; choose from {', '.join(names)}"
                self._wrong(f"{prefix}{key}: is not a key of a policy{allowed}")
            elif value is None:
                self._wrong(f"{prefix}{key}: has no value; give it one, or leave out the line")
            elif key in known and (problem := known[key].problem(value)):
                self._wrong(problem)
            else:
                found[key] = value
        return (
            {key: value for key, value in found.items() if key in known},
            {key: value for key, value in found.items() if key in inner},
        )

    def combined(self, privacy: Mapping[str, Any]) -> None:
        """Check what one key of `privacy` needs of another."""
        if ("most_epsilon" in privacy) != ("delta" in privacy):
            missing = "delta" if "most_epsilon" in privacy else "most_epsilon"
            other = "most_epsilon" if missing == "delta" else "delta"
            self._wrong(
                f"privacy.{other}={privacy[other]}: needs privacy.{missing}, too; add it, such as"
                f" {'delta: 1e-6' if missing == 'delta' else 'most_epsilon: 8'}"
            )
        if "most_epsilon" in privacy and "none" in privacy.get("units", []):
            self._wrong(
                f"privacy.units={typed(privacy['units'])}: with privacy.most_epsilon no run without"
                " privacy is accepted; leave out none, or most_epsilon"
            )

    def _wrong(self, problem: str) -> None:
        self.problems.append(f"{self.file}: {problem}")


def _loaded(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and reads 1e-6 as a number, which YAML 1.1 does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{twice[0]} stands twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _options(cls: type[Any], prefix: str) -> dict[str, Option]:
    """Name -> option, typed with `prefix`, for each field of a class that is an option."""
    names = {one.name for one in fields(cls) if "option" in one.metadata}
    found = {one.name: one for one in options_of(cls, "policy") if one.name in names}
    return {
        name: replace(one, key=f"{prefix}{name}", kinds=tuple(set(one.kinds) - {NoneType}))
        for name, one in found.items()
    }
