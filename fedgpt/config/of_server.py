"""The options that a server sends to a site, which trusts it with nothing.

A site reads the parts that a client needs, and only as plain values:

    name, seed, rounds, tokens, model, task, local, pace, update, privacy, corpus.name

It imports no class, resolves no reference such as ${oc.env:HOME}, and opens no file: every other
part of a run's options is dropped before anything of it is looked at. So a problem that the site
reports has only what the server itself has sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgpt.config import overrides
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.core.targets import CUSTOM
from fedgpt.model.shape import trainable_problems
from fedgpt.update.compress import CODECS

PARTS = ("name", "seed", "rounds", "tokens", "model", "task", "local", "pace", "update", "privacy")
CODE = ("task", "update")  # parts that may name a class
MOST_CHARACTERS = 1 << 20  # of all options; they have about 6,000
REFERENCE = "${"


def options_of_server(text: str) -> RunOptions:
    """The options in the YAML text of a run, as far as a site reads them.

    Raises ConfigError for a text that is no such YAML, for wrong values, and for a class of another
    package than fedgpt.
    """
    sent = _plain(text)
    if packages := sent.get("trusted_packages"):
        raise ConfigError(
            f"trusted_packages={packages!r:.100}: a site runs no code that a server names; leave it"
            " out"
        )
    corpus = sent.get("corpus")
    kept = {name: sent[name] for name in PARTS if name in sent}
    kept["corpus"] = {"name": corpus.get("name") if isinstance(corpus, Mapping) else corpus}
    for part in CODE:
        if isinstance(kept.get(part), Mapping) and _names_code(kept[part]):
            raise ConfigError(
                f"{part}._target_={kept[part].get('_target_')!r:.100}: a site runs no code that a"
                f" server names; choose one of fedgpt's own"
            )
    if (found := _with_reference(kept)) is not None:
        raise ConfigError(f"{found!r:.100}: a site resolves no references; send the value itself")
    options = _typed(kept)
    problems = [
        *options.problems(),
        *trainable_problems(options.model),
        *CODECS.problems(options.update),
    ]
    # a site has no part of these
    problems = [one for one in problems if one.partition(".")[0].partition("=")[0] in PARTS]
    if problems:
        raise ConfigError(problems)
    return options


def _plain(text: str) -> Mapping[str, Any]:
    """The mapping in a YAML text without aliases, which may stand for any amount of data."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"configuration: has {len(text):,} characters")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError("configuration: has an alias of YAML")
        found = yaml.safe_load(text)
    except overrides.YAML_ERRORS as error:
        raise ConfigError(f"configuration: is not YAML ({overrides.first_line(error)})") from error
    if not isinstance(found, Mapping) or not found:
        raise ConfigError("configuration: is not a YAML mapping of options to values")
    return found


def _names_code(part: Mapping[str, Any]) -> bool:
    return part.get("_target_") is not None or CUSTOM in (part.get("name"), part.get("compress"))


def _with_reference(value: Any) -> str | None:
    """The first text or name of a reference in plain data; None if there is none."""
    if isinstance(value, str):
        return value if REFERENCE in value else None
    inner: list[Any] = []
    if isinstance(value, Mapping):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        inner = value
    return next((found for one in inner if (found := _with_reference(one)) is not None), None)


def _typed(kept: Mapping[str, Any]) -> RunOptions:
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunOptions), OmegaConf.create(dict(kept)))
        options = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, OverflowError, AssertionError, ValueError) as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{key}: {overrides.first_line(error)}") from error
    assert isinstance(options, RunOptions), "the schema is its class"
    return options
