"""Checks each typed override against the existing groups and options; all problems are reported at
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache, lru_cache, partial
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from fedgpt.config.choices import CONF, YAML_ERRORS, groups
from fedgpt.config.texts import LISTS
from fedgpt.config.user_files import file_problems
from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import OPTIONS, RunOptions, StrategyOptions
from fedgpt.core.options.option import short

MOST_VALUES = 10_000  # largest number of values of one option in a sweep
MOST_JOBS = 300  # largest number of jobs of a sweep that are checked before the first job runs


def _opened(node: DictConfig) -> DictConfig:
    """`node`, where any key may be added to `arguments`, as each class has others."""
    for one in (node, *(child for child in node.values() if isinstance(child, DictConfig))):
        if "arguments" in one:
            OmegaConf.set_struct(one.arguments, False)
    return node


HYDRA = ("hydra.", "hydra/")  # options of Hydra itself begin so
DEEPEST = 20  # levels of lists and mappings in a value; the libraries fail from about 100 on
# option that a choice of its group sets, such as update.compress -> its group
SET_BY = {
    f"{kind.group}.{kind.choice_field}": kind.group
    for kind in (field.default_factory for field in fields(RunOptions))
    if isinstance(kind, type) and f"{kind.group}.{kind.choice_field}" in OPTIONS
}
SCHEMAS = ConfigStore.instance()  # the types and defaults of all options
SCHEMAS.store(name="schema", node=_opened(OmegaConf.structured(RunOptions)))
# a plain mapping, as every strategy is one
SCHEMAS.store(
    group="strategy", name="of_ones_own", node=_opened(OmegaConf.create(asdict(StrategyOptions())))
)


def check_words(
    overrides: Sequence[str], config_dir: str | None
) -> tuple[list[str], list[str], DictConfig]:
    """Return (problems, overrides without a problem, their configuration without sweeps); each
    override is checked separately.
    """
    problems: list[str] = []
    good: list[str] = []
    parsed: list[Override] = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            override = parser.parse_override(text)
            if _is_deep(override.value()):
                raise RecursionError
            parsed.append(override)
        except ValueError:  # an integer of more than 4300 digits
            problems.append(f"{text[:60]}...: a number of {len(text):,} characters; type fewer")
        except RecursionError:
            problems.append(f"{text[:60]}...: is nested too deeply; type fewer brackets")
        except HydraException:
            key, equals, value = text.partition("=")
            text_of = f'["{value.strip("[]")}"]' if key in LISTS else f'"{value}"'
            how = (
                "; a text with special characters needs quotes within the shell's quotes:"
                f" '{key}={text_of}'"
            )
            problems.append(f"{text}: not of the form key=value{how if equals else ''}")
    known = groups(config_dir)
    for override in [o for o in parsed if o.key_or_group in known]:
        found = list(_group_problems(override, known, config_dir))
        problems += found
        if not found:
            good.append(str(override.input_line))
    # options are checked with the first choice of every group of a sweep; problems with the other
    # choices are found when their jobs are composed
    cfg = compose_config(
        [text for line in good for text in _single_values(parser.parse_override(line), known)[:1]]
        + [str(o.input_line) for o in parsed if o.key_or_group.startswith(HYDRA)],
        config_dir,
    )
    scratch = _open_copy(cfg)  # one for all values, as a copy takes long
    values: list[Override] = []
    for override in [o for o in parsed if o.key_or_group not in known]:
        found = list(_value_problems(override, cfg, scratch))
        problems += found
        if not found:
            good.append(str(override.input_line))
            values += [] if override.is_sweep_override() else [override]
    return problems, good, with_values(cfg, values)


def _group_problems(
    override: Override, known: dict[str, list[str]], config_dir: str | None
) -> Iterator[str]:
    group = override.key_or_group
    names = sorted(known[group])
    if (override.is_add() or override.is_force_add()) and group in groups(None):
        yield f"{override.input_line}: {PLUS}"
        return
    for choice in _values(override, known):
        if choice is None and group == "experiment":
            continue
        for name in choice if isinstance(choice, list) else [choice]:
            if str(name) not in names:
                yield f"{group}={name}: choose from {', '.join(names)}{nearest(str(name), names)}"
            elif config_dir is not None:
                yield from file_problems(config_dir, group, str(name))


REFERENCE = (
    "${...} must name another option, such as ${seed}; type \\${ for the characters ${ themselves"
)
PLUS = "a plus adds a name that is not there yet; leave out the plus"
OF_FLOWER = "; an option that only the class of strategy=flower knows is typed with a plus: +"


def _value_problems(override: Override, cfg: DictConfig, scratch: DictConfig) -> Iterator[str]:
    """The problems of an override of `cfg`; the value is tried in its copy `scratch`."""
    key = override.key_or_group
    if key.startswith(HYDRA):
        return
    if override.is_delete():
        yield f"{override.input_line}: an option can be set, not deleted"
        return
    if group := SET_BY.get(key):
        for value in _values(override, {}):
            yield f"{key}={value}: is set by the choice of its group; type {group}={value}"
        return
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, default=None) if parent else cfg
    exists = isinstance(node, DictConfig) and leaf in node
    if exists and override.is_add():
        yield f"{override.input_line}: {PLUS}"
        return
    if ".arguments." in key:
        holder = f"{key.partition('.arguments.')[0]}.arguments"
        exists = isinstance(OmegaConf.select(cfg, holder), DictConfig)
    if not exists and not (override.is_add() and parent.split(".")[0] == "strategy"):
        hint = ""
        if parent == "strategy":
            choice = node if isinstance(node, DictConfig) else {}
            ours = str(choice.get("_target_")).startswith("fedgpt.")
            hint = "" if ours else OF_FLOWER + key
            hint = f"; type strategy.arguments.{leaf}" if "arguments" in choice else hint
        yield f"{override.input_line}: no option {key!r}{hint}{nearest(key, _keys(cfg))}"
        return
    for value in _values(override, {}):
        try:
            OmegaConf.update(scratch, key, value)
        except (OmegaConfBaseException, OverflowError) as error:
            yield _refused(override, value, error)


def _is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether a value has more levels of lists and mappings; a sweep counts as a list."""
    value = value.list if isinstance(value, ChoiceSweep) else value
    if not isinstance(value, list | dict):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deep(each, levels - 1) for each in inside)


def _refused(override: Override, value: Any, error: Exception) -> str:
    """The problem of a value that the option's type does not take."""
    key = override.key_or_group
    if isinstance(error, GrammarParseError):
        return f"{key}={value}: {REFERENCE}"
    if isinstance(error, OverflowError):
        return f"{key}={short(value)}: is too large for a number with a fraction"
    typed = f"{key}={value}" if override.is_sweep_override() else override.input_line
    known = key in OPTIONS and OPTIONS[key].kinds
    return f"{typed}: {OPTIONS[key].needs(value) if known else first_line(error)}"


def _single_values(override: Override, known: dict[str, list[str]]) -> list[str]:
    """The override as typed, or an override for each value of a sweep over listed choices."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value = override.value()
    if isinstance(value, Glob):
        values = value.filter(known.get(override.key_or_group, []))
    else:
        values = []
        if override.is_discrete_sweep():
            values = list(islice(override.sweep_string_iterator(), MOST_VALUES + 1))
        if len(values) > MOST_VALUES:
            raise ConfigError(
                f"{override.input_line}: has more than {MOST_VALUES:,} values; a sweep runs each of"
                " them"
            )
    return [f"{override.get_key_element()}={value}" for value in values]


def _values(override: Override, known: dict[str, list[str]]) -> list[Any]:
    parser = OverridesParser.create()
    return [parser.parse_override(text).value() for text in _single_values(override, known)]


def _open_copy(cfg: DictConfig) -> DictConfig:
    """A copy to which any key may be added."""
    copy = cfg.copy()
    OmegaConf.set_struct(copy, False)
    return copy


def with_values(cfg: DictConfig, overrides: Iterable[Override]) -> DictConfig:
    """The configuration with the values of overrides that choose no group."""
    changed = _open_copy(cfg)
    for override in overrides:
        if not override.key_or_group.startswith(HYDRA):
            OmegaConf.update(changed, override.key_or_group, override.value())
    return changed


def jobs_of_sweep(
    overrides: Sequence[str], config_dir: str | None
) -> Iterator[tuple[str, Callable[[], DictConfig]]]:
    """Yield (typed values, function that composes it) for every job of a sweep; at most
    MOST_JOBS.
    """
    parser, known = OverridesParser.create(), groups(config_dir)
    parsed = [parser.parse_override(text) for text in overrides]
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    axes = [
        choices for o in parsed if o.is_sweep_override() and (choices := _single_values(o, known))
    ]
    while prod(map(len, axes)) > MOST_JOBS:
        max(axes, key=len).pop()
    # Hydra composes each combination of groups once: changing values is much faster
    with_groups = cache(lambda chosen: compose_config([*fixed, *chosen], config_dir))

    def compose_job(texts: tuple[str, ...]) -> DictConfig:
        chosen = [parser.parse_override(text) for text in texts]
        cfg = with_groups(tuple(str(o.input_line) for o in chosen if o.key_or_group in known))
        return with_values(cfg, [o for o in chosen if o.key_or_group not in known])

    for texts in product(*axes):
        yield " ".join(texts), partial(compose_job, texts)


def compose_config(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    """The configuration that Hydra composes from overrides; raises ConfigError if that fails.

    Without a folder of the user's it is composed once in a process, and then copied, which takes a
    tenth of the time.
    """
    if config_dir is None:
        return _composed(tuple(overrides)).copy()
    if not Path(config_dir).is_dir():
        raise ConfigError(
            f"--config-dir {config_dir}: no such folder; it holds groups of your own, such as"
            " model/"
        )
    searchpath = f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"
    return _compose((*overrides, searchpath))


def _compose(overrides: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose("run", [*overrides])
        except MissingConfigException as error:
            raise ConfigError(_missing(error)) from error
        except (HydraException, OmegaConfBaseException, OverflowError, *YAML_ERRORS) as error:
            raise ConfigError(_with_cause(error)) from error


_composed = lru_cache(maxsize=256)(_compose)
# choices of Hydra's groups that its plug-ins bring -> the package to install
PLUGINS = {
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/ray": "hydra-ray-launcher",
    "hydra/launcher/rq": "hydra-rq-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper/ax": "hydra-ax-sweeper",
    "hydra/sweeper/nevergrad": "hydra-nevergrad-sweeper",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
    "hydra/hydra_logging/colorlog": "hydra-colorlog",
    "hydra/job_logging/colorlog": "hydra-colorlog",
}


def _missing(error: MissingConfigException) -> str:
    """The problem of a choice that is not there: what to install, or the choices that are."""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if package := PLUGINS.get(f"{group}/{name}"):
        return (
            f"{group}={name}: is a plug-in of Hydra that is not installed; install it with: pip"
            f" install {package}"
        )
    if not error.options:
        return first_line(error)
    names = sorted(error.options)
    return f"{group}={name}: choose from {', '.join(names)}{nearest(name, names)}"


def _with_cause(error: Exception) -> str:
    """The message of an error of Hydra, and that of the error behind it, which has the key."""
    text, cause = first_line(error), error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return text
    return ": ".join(filter(None, (text.rstrip(".:"), cause.full_key, first_line(cause))))


def is_about(problem: str, option: str) -> bool:
    """Whether a problem names an option or group; a wrong override of it may have caused the
    problem.

    >>> is_about("privacy.delta=1: privacy=none protects nothing", "privacy")
    True
    >>> is_about("rounds=0: must be at least 1", "privacy")
    False
    """
    end = r"(?!\w)" if "." in option else "[.=]"
    return re.search(rf"(?<![\w.]){re.escape(option)}{end}", problem) is not None


def first_line(error: BaseException) -> str:
    """The message of a library's error without its context lines, or the message of its cause if it
    has none.
    """
    text = str(getattr(error, "msg", None) or error).strip()
    if not text and error.__cause__ is not None:
        return first_line(error.__cause__)
    return text.splitlines()[0] if text else type(error).__name__


def _keys(cfg: DictConfig) -> list[str]:
    """Every option as typed."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            yield f"{prefix}{name}"
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(cfg, ""))
