"""The options that a server sends to a site, which trusts it with nothing.

A site reads the parts that a client needs, and only as plain values:

    name, seed, rounds, tokens, model, task, local, pace, update, privacy, corpus.name

It imports no class, resolves no reference such as ${oc.env:HOME}, and opens no file: every other
part of a run's options is dropped before anything of it is looked at. So a problem that the site
reports has only what the server itself has sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgpt.config import overrides
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import ModelOptions, RunOptions
from fedgpt.core.targets import CUSTOM
from fedgpt.model.shape import trainable_problems
from fedgpt.update.compress import CODECS

PARTS = ("name", "seed", "rounds", "tokens", "model", "task", "local", "pace", "update", "privacy")
CODE = ("task", "update")  # parts that may name a class
# of all options: they have about 2,200 characters and 250 events of YAML, six times as many with
# the name of every parameter of 48 layers; the values are at most three levels deep
MOST_CHARACTERS, MOST_EVENTS, MOST_LEVELS = 1 << 16, 1 << 12, 16
MOST_MATCHES = 1 << 16  # layers whose parameters are compared with a pattern, for all patterns
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
    problems = [*options.problems(), *CODECS.problems(options.update)]
    # a site has no part of these
    problems = [one for one in problems if one.partition(".")[0].partition("=")[0] in PARTS]
    if problems := problems or _trainable_problem(options.model):
        raise ConfigError(problems)
    return options


def _trainable_problem(model: ModelOptions) -> list[str]:
    """The first problem of model.trainable, if there is one, found within a second."""
    if wrong := next((one for one in model.trainable if not isinstance(one, str)), None):
        return [f"model.trainable=[{wrong!r:.100}]: must be patterns of names"]
    if model.n_layer * len(model.trainable) > MOST_MATCHES:
        return [
            f"model.trainable: has {len(model.trainable):,} patterns for {model.n_layer:,} layers,"
            " and a site does not compare so many; write fewer, with * for any characters"
        ]
    return list(islice(trainable_problems(model), 1))


def _plain(text: str) -> Mapping[str, Any]:
    """The mapping in a YAML text without aliases, which may stand for any amount of data.

    The time of PyYAML is quadratic in the number of levels, and each value takes OmegaConf long.
    """
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"configuration: has {len(text):,} characters, and a site reads {MOST_CHARACTERS:,}"
        )
    level = 0
    try:
        # it reads on as the loop does
        for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError("configuration: has an alias of YAML")
            level += isinstance(event, yaml.CollectionStartEvent)
            level -= isinstance(event, yaml.CollectionEndEvent)
            if level > MOST_LEVELS:
                raise ConfigError(f"configuration: has more than {MOST_LEVELS} levels")
            if number > MOST_EVENTS:
                raise ConfigError("configuration: has more values than a site reads")
        found = yaml.safe_load(text)
    except (OverflowError, *overrides.YAML_ERRORS) as error:  # the former for a very large float
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
