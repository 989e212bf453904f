"""Configuration: Hydra composes conf/, this module checks it and says everything that is wrong at once.

Free of torch, so a typo is answered at once. `_target_` is resolved only inside an allow-list.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgpt import checks
from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import RunOptions
from fedgpt.engine.fleet import replay_problems
from fedgpt.engine.pace import make_pace, pace_problems
from fedgpt.privacy.problems import privacy_problems

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
TRUSTED = ("fedgpt.aggregate", "flwr.serverapp.strategy")
MOST_JOBS = 300  # of a sweep, that are checked before its first one runs

FREE = ("cache_dir", "run_dir", "runtime.workers")  # where a run computes may change

ConfigStore.instance().store(name="schema", node=RunOptions)


def load(overrides: Sequence[str] = (), config_dir: str | None = None) -> RunOptions:
    """Options for `fedgpt run <overrides>`; raises ConfigError with every problem that was found."""
    problems, good = _check_overrides(overrides, config_dir)
    parser = OverridesParser.create()
    swept = [text for text in good if parser.parse_override(text).is_sweep_override()]
    problems += [
        f"{text}: is a sweep, which is typed with -m (fedgpt run -m {text}); a text with commas is typed in quotes"
        for text in swept
    ]
    options = None
    try:
        options = to_options(_compose([text for text in good if text not in swept], config_dir), here=True)
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    if problems or options is None:
        raise ConfigError(problems)
    return options


def precheck(overrides: Sequence[str], config_dir: str | None = None) -> None:
    """Like load, for a sweep (`seed=0,1,2`), all of whose jobs are checked; of more than MOST_JOBS, that many.

    What is wrong with every job is told as such, the rest with the first job that it is wrong with.
    """
    problems, good = _check_overrides(overrides, config_dir)
    found: dict[str, list[str]] = {}  # problem -> jobs that have it
    jobs = list(_sweep(good, config_dir))
    for job, composed in jobs:
        try:
            to_options(composed(), here=True)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(job)
    for problem, where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        told = problem if len(where) == len(jobs) else f"{problem} (in the job {where[0]}{more})"
        problems += [told] if problem not in problems else []
    if problems:
        raise ConfigError(problems)


def to_options(cfg: DictConfig, here: bool = False) -> RunOptions:
    """Typed options of a composed configuration, checked one by one and against each other.

    `here`: a run shall start on this machine. A run's folder is read elsewhere, too, where Ray may be missing.
    """
    try:
        options = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error
    assert isinstance(options, RunOptions), "the schema is the root of run.yaml"
    if problems := list(_problems(options, here)):
        raise ConfigError(problems)
    options.run_dir = str(Path(options.run_dir).expanduser().resolve())
    options.cache_dir = str(Path(options.cache_dir).expanduser().resolve())
    if options.init_from:
        options.init_from = str(Path(options.init_from).expanduser().resolve())
    if options.fleet.path:
        options.fleet.path = str(Path(options.fleet.path).expanduser().resolve())
    if options.corpus.path:
        options.corpus.path = str(Path(options.corpus.path).expanduser().resolve())
    return options


def to_yaml(options: RunOptions) -> str:
    """The resolved options as YAML: what config.yaml holds and what travels to clients."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def from_yaml(text: str) -> RunOptions:
    """Options from to_yaml's text; raises ConfigError where they do not fit this version's schema."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunOptions), OmegaConf.create(text))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error
    assert isinstance(cfg, DictConfig), "a YAML mapping"
    return to_options(cfg)


def of_run(folder: Path) -> RunOptions:
    """The options that a run's folder holds; raises ConfigError where it is none."""
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run's folder: it has no config.yaml")
    options = from_yaml(path.read_text(encoding="utf-8"))
    options.run_dir = str(folder.resolve())
    return options


def flat_options(options: RunOptions) -> dict[str, Any]:
    """Dotted option -> value, of everything that a run's result depends on."""
    flat = _flat(OmegaConf.create(to_yaml(options)))
    return {key: value for key, value in flat.items() if key not in FREE}


def changed_options(before: dict[str, Any], options: RunOptions) -> str:
    """What differs between the options of a checkpoint and those of now, each as `name: old -> new`."""
    now = flat_options(options)
    keys = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys)


def refuse_another_run(options: RunOptions) -> None:
    """Raise ConfigError, naming the options that differ, where `run_dir` holds a run of another configuration."""
    path = Path(options.run_dir) / "config.yaml"
    if not path.exists():
        return
    before, now = _flat(OmegaConf.create(path.read_text(encoding="utf-8"))), _flat(OmegaConf.create(to_yaml(options)))
    differing = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k) and k not in FREE)
    if differing:
        raise ConfigError(
            f"run_dir={options.run_dir}: holds another run, which differs in {', '.join(differing)}; "
            f"continue that one with `fedgpt run resume={options.run_dir}`, or name another run_dir"
        )


def build_strategy(node: Any, trusted: Iterable[str] = ()) -> Any:
    """The object that `strategy` names: its `_target_` class called with the other keys.

    Only classes inside fedgpt, Flower's strategies and `trusted_packages` are ever imported.
    """
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise ConfigError(f"strategy={node!r}: a strategy needs `_target_`, the full name of its class")
    target = node["_target_"]
    allowed = (*TRUSTED, *trusted)
    if not any(target.startswith(f"{package}.") for package in allowed):
        raise ConfigError(
            f"strategy._target_={target}: only classes in {', '.join(allowed)} are used; "
            f"to trust another package add trusted_packages=[{target.split('.')[0]}]"
        )
    module_name, _, class_name = target.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"strategy._target_={target}: cannot import {module_name} ({error})") from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        names = [name for name, member in vars(module).items() if inspect.isclass(member)]
        raise ConfigError(
            f"strategy._target_={target}: {module_name} has no class {class_name}{nearest(class_name, names)}"
        )
    return _call(cls, {key: value for key, value in node.items() if key != "_target_"})


def _call(cls: type, arguments: dict[str, Any]) -> Any:
    known = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    if not takes_any and (unknown := [name for name in arguments if name not in known]):
        allowed = ", ".join(known) or "none"
        raise ConfigError(
            f"strategy.{name}={arguments[name]}: the options of {cls.__name__} are {allowed}{nearest(name, known)}"
            for name in unknown
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"strategy: {cls.__name__} refused its options: {error}") from error


# ---- checks


def _check_overrides(overrides: Sequence[str], config_dir: str | None) -> tuple[list[str], list[str]]:
    """(problems, overrides without any): each override is tried by itself, so all mistakes are told at once."""
    problems: list[str] = []
    good: list[str] = []
    parsed: list[Override] = []
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            problems.append(f"{text}: not of the form key=value ({_first_line(error)})")
    groups = _groups(config_dir)
    for override in [o for o in parsed if o.key_or_group in groups]:
        found = list(_group_problems(override, groups))
        problems += found
        if not found:
            good.append(str(override.input_line))
    # options are looked up beside the first choice of every group; what is wrong beside others, their jobs tell
    cfg = _compose([text for line in good for text in _choices(parser.parse_override(line), groups)[:1]], config_dir)
    for override in [o for o in parsed if o.key_or_group not in groups]:
        found = list(_value_problems(override, cfg))
        problems += found
        if not found:
            good.append(str(override.input_line))
    return problems, good


def _group_problems(override: Override, groups: dict[str, list[str]]) -> Iterator[str]:
    group, known = override.key_or_group, groups[override.key_or_group]
    for choice in _values(override, groups):
        if choice is None and group == "experiment":
            continue
        for name in choice if isinstance(choice, list) else [choice]:
            if str(name) not in known:
                yield f"{group}={name}: choose from {', '.join(known)}{nearest(str(name), known)}"


def _value_problems(override: Override, cfg: DictConfig) -> Iterator[str]:
    key = override.key_or_group
    if key.startswith("hydra.") or override.is_delete():
        return
    parent, _, leaf = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, default=None) if parent else cfg
    exists = isinstance(node, DictConfig) and leaf in node
    if not exists and not (override.is_add() and parent.split(".")[0] == "strategy"):
        hint = "; a new field of a strategy is typed with a plus: +" + key if parent == "strategy" else ""
        yield f"{override.input_line}: no option {key!r}{hint}{nearest(key, _keys(cfg))}"
        return
    for value in _values(override, {}):
        try:
            _updated(cfg, {key: value})
        except OmegaConfBaseException as error:
            yield f"{key}={value}: {_first_line(error)}"


def _choices(override: Override, groups: dict[str, list[str]]) -> list[str]:
    """The override as typed, or an override for each value of a sweep over listed choices."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    value = override.value()
    if isinstance(value, Glob):
        values = value.filter(groups.get(override.key_or_group, []))
    else:
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
    return [f"{override.get_key_element()}={value}" for value in values]


def _values(override: Override, groups: dict[str, list[str]]) -> list[Any]:
    parser = OverridesParser.create()
    return [parser.parse_override(text).value() for text in _choices(override, groups)]


def _updated(cfg: DictConfig, values: dict[str, Any]) -> DictConfig:
    changed = cfg.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in values.items():
        OmegaConf.update(changed, key, value)
    return changed


def _sweep(overrides: Sequence[str], config_dir: str | None) -> Iterator[tuple[str, Callable[[], DictConfig]]]:
    """(its choices as typed, how to compose it) of every job of a sweep; at most MOST_JOBS."""
    parser, groups = OverridesParser.create(), _groups(config_dir)
    parsed = [parser.parse_override(text) for text in overrides]
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    axes = [choices for o in parsed if o.is_sweep_override() and (choices := _choices(o, groups))]
    while prod(map(len, axes)) > MOST_JOBS:
        max(axes, key=len).pop()
    composed = cache(lambda chosen: _compose([*fixed, *chosen], config_dir))  # takes longer than to change values

    def compose_job(texts: tuple[str, ...]) -> DictConfig:
        chosen = [parser.parse_override(text) for text in texts]
        values = {o.key_or_group: o.value() for o in chosen if o.key_or_group not in groups}
        cfg = composed(tuple(str(o.input_line) for o in chosen if o.key_or_group in groups))
        return _updated(cfg, {key: value for key, value in values.items() if not key.startswith("hydra.")})

    for texts in product(*axes):
        yield " ".join(texts), partial(compose_job, texts)


def _problems(o: RunOptions, here: bool) -> Iterator[str]:
    """Everything wrong with the values, alone and together; `here`: also with starting a run on this machine."""
    yield from checks.problems(o)
    if here:
        yield from checks.runtime_problems(o.runtime.name, o.partition.clients if o.partition.name != "natural" else 0)
    try:
        strategy = build_strategy(o.strategy, o.trusted_packages)
    except ConfigError as error:
        yield from error.problems
    else:
        switches = getattr(strategy, "switches", False)
        yield from pace_problems(o.pace, switches)
        yield from replay_problems(o, switches)
        yield from _pacing_problems(o, strategy)
        if o.corpus.public == 0 and getattr(strategy, "needs_root", False):
            yield (
                f"corpus.public=0: strategy={strategy.name} trains the server's own update on the public part; "
                "raise it, or take another rule, such as strategy=median"
            )
        yield from privacy_problems(o, strategy)


def _pacing_problems(o: RunOptions, strategy: Any) -> Iterator[str]:
    """Whether the strategy is right for the pacing."""
    paces = getattr(strategy, "paces", {"cohort"})
    if o.pace.name not in paces:
        reason = getattr(strategy, "because", {}).get(o.pace.name, "")
        only = f"{type(strategy).__name__} is right for pace={' or '.join(sorted(paces))} only"
        yield f"pace={o.pace.name}: {only}{': ' if reason else ''}{reason}"
    elif o.pace.clients and hasattr(strategy, "problems") and o.pace.name in ("cohort", "buffer"):
        yield from strategy.problems(make_pace(o.pace, o.seed).pacing(o.pace.clients))


def _first_line(error: BaseException) -> str:
    """What a library's error says, without its context lines; the cause's words where it has none of its own."""
    text = str(getattr(error, "msg", None) or error).strip()
    if not text and error.__cause__ is not None:
        return _first_line(error.__cause__)
    return text.splitlines()[0] if text else type(error).__name__


def _compose(overrides: Sequence[str], config_dir: str | None) -> DictConfig:
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose("run", [*overrides, *searchpath])
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(_first_line(error)) from error


def _groups(config_dir: str | None) -> dict[str, list[str]]:
    """Group -> its choices, from the packaged conf/ and from the user's folder."""
    groups: dict[str, list[str]] = {}
    for root in [CONF, *([Path(config_dir)] if config_dir else [])]:
        for path in sorted(root.glob("*/*.yaml")):
            groups.setdefault(path.parent.name, []).append(path.stem)
    return groups


def _flat(cfg: Any) -> dict[str, Any]:
    """Dotted option -> value."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if not isinstance(node, dict):
            yield prefix.rstrip("."), node
            return
        for name, child in node.items():
            yield from walk(child, f"{prefix}{name}.")

    return dict(walk(OmegaConf.to_container(cfg), ""))


def _keys(cfg: DictConfig) -> list[str]:
    """Every option as typed."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            yield f"{prefix}{name}"
            child = node._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from walk(child, f"{prefix}{name}.")

    return list(walk(cfg, ""))
