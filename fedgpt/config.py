"""Configuration: Hydra composes conf/, this module checks it and says everything that is wrong at once.

Free of torch, so a typo is answered at once. `_target_` is resolved only inside an allow-list.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from math import inf
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgpt.core.errors import ConfigError, nearest
from fedgpt.core.options import RunOptions
from fedgpt.data.corpora import corpus_problems
from fedgpt.data.partition import partition_problems
from fedgpt.data.tokenizer import tokenizer_problems
from fedgpt.engine import attack, fleet, trust
from fedgpt.engine.pace import make_pace, pace_problems
from fedgpt.model.shape import check_model
from fedgpt.privacy import problems as privacy
from fedgpt.update.compress import update_problems

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
TRUSTED = ("fedgpt.aggregate", "flwr.serverapp.strategy")

FREE = ("cache_dir", "run_dir", "runtime.workers")  # where a run computes may change

ConfigStore.instance().store(name="schema", node=RunOptions)

# option -> (what is allowed, test); a number that a user could get wrong has its line here
_RANGES: dict[str, tuple[str, Any]] = {
    "seed": ("a whole number from 0", lambda v: v >= 0),
    "rounds": ("at least 1", lambda v: v >= 1),
    "local.steps": ("at least 1", lambda v: v >= 1),
    "local.batch_size": ("at least 1", lambda v: v >= 1),
    "local.accumulate": ("at least 1", lambda v: v >= 1),
    "local.lr": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "local.min_lr": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "local.warmup": ("from 0 to below 1 (a share of the run's tokens)", lambda v: 0 <= v < 1),
    "local.beta1": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "local.beta2": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "local.weight_decay": ("at least 0", lambda v: v >= 0),
    "local.grad_clip": ("at least 0 (0 = off)", lambda v: v >= 0),
    "local.moments": ("keep or reset", ("keep", "reset").__contains__),
    "local.precision": ("auto, fp32 or bf16", ("auto", "fp32", "bf16").__contains__),
    "tokens": ("at least 0 (0 = end after `rounds`)", lambda v: v >= 0),
    "clock": ("real or virtual", ("real", "virtual").__contains__),
    "pace.name": ("cohort or buffer", ("cohort", "buffer").__contains__),
    "pace.clients": ("at least 0 (0 = all)", lambda v: v >= 0),
    "pace.rate": ("above 0 and at most 1", lambda v: v is None or 0 < v <= 1),
    "pace.goal": ("at least 1", lambda v: v is None or v >= 1),
    "pace.deadline": ("above 0 seconds", lambda v: v is None or v > 0),
    "pace.minimum": ("at least 0", lambda v: v >= 0),
    "pace.grace": ("at least 0 seconds", lambda v: v is None or v >= 0),
    "pace.max_staleness": ("at least 0 versions", lambda v: v is None or v >= 0),
    "fleet.name": (", ".join(fleet.NAMES), fleet.NAMES.__contains__),
    "fleet.median": ("above 0 seconds", lambda v: v > 0),
    "fleet.spread": ("at least 0", lambda v: v >= 0),
    "fleet.down": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.up": ("at least 0 seconds per megabyte", lambda v: v >= 0),
    "fleet.jitter": ("at least 0", lambda v: v >= 0),
    "fleet.dropout": ("from 0 to below 1", lambda v: 0 <= v < 1),
    "validate.norm": ("at least 1, or 0 (off)", lambda v: v == 0 or 1 <= v < inf),
    "validate.clip": ("above 0, or 0 (off)", lambda v: 0 <= v < inf),
    "validate.strikes": ("at least 0 (0 = never)", lambda v: v >= 0),
    "validate.rest": ("at least 1 round", lambda v: v >= 1),
    "attack.name": (", ".join(attack.NAMES), attack.NAMES.__contains__),
    "attack.clients": ("at least 0", lambda v: v >= 0),
    "attack.strength": ("above 0 and finite", lambda v: 0 < v < inf),
    "runtime.name": ("pool, ray or superlink", ("pool", "ray", "superlink").__contains__),
    "runtime.workers": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.threads": ("at least 0 (0 = choose)", lambda v: v >= 0),
    "runtime.device": ("auto, cpu or cuda", ("auto", "cpu", "cuda").__contains__),
    "runtime.watchdog": ("at least 0 seconds (0 = off)", lambda v: 0 <= v < inf),
    "evaluate.rollback": ("at least 0 (a share of the best loss)", lambda v: v is None or 0 <= v < inf),
    "evaluate.every": ("at least 0 (0 = first and last version)", lambda v: v is None or v >= 0),
    "evaluate.tokens": ("at least 0 (0 = all)", lambda v: v >= 0),
    "evaluate.samples": ("at least 0", lambda v: v >= 0),
    "evaluate.sample_tokens": ("at least 1", lambda v: v >= 1),
    "checkpoint.every": ("at least 0 (0 = only the last)", lambda v: v is None or v >= 0),
    "checkpoint.keep": ("at least 1", lambda v: v >= 1),
    **privacy.RANGES,
}


def load(overrides: Sequence[str] = (), config_dir: str | None = None) -> RunOptions:
    """Options for `fedgpt run <overrides>`; raises ConfigError with every problem that was found."""
    problems, good = _check_overrides(overrides, config_dir)
    options = None
    try:
        options = to_options(_compose(good, config_dir))
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
    if problems or options is None:
        raise ConfigError(problems)
    return options


def precheck(overrides: Sequence[str], config_dir: str | None = None) -> None:
    """Like load, but sweeps (`seed=0,1,2`) are allowed: each of their choices is checked by itself."""
    problems, _ = _check_overrides(overrides, config_dir)
    if problems:
        raise ConfigError(problems)


def to_options(cfg: DictConfig) -> RunOptions:
    """Typed options of a composed configuration, checked one by one and against each other."""
    try:
        options = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {_first_line(error)}") from error
    assert isinstance(options, RunOptions), "the schema is the root of run.yaml"
    if problems := list(_problems(options)):
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
    single = [text for text in good if not parser.parse_override(text).is_sweep_override()]
    cfg = _compose(single, config_dir)
    for override in [o for o in parsed if o.key_or_group not in groups]:
        found = list(_value_problems(override, cfg))
        problems += found
        if not found:
            good.append(str(override.input_line))
    return problems, good


def _group_problems(override: Override, groups: dict[str, list[str]]) -> Iterator[str]:
    group, known = override.key_or_group, groups[override.key_or_group]
    for choice in _choices(override):
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
    for value in _choices(override):
        trial = cfg.copy()
        OmegaConf.set_struct(trial, False)
        try:
            OmegaConf.update(trial, key, value)
        except OmegaConfBaseException as error:
            yield f"{key}={value}: {_first_line(error)}"


def _choices(override: Override) -> list[Any]:
    """The value of an override, or each value of a sweep over listed choices."""
    if not override.is_sweep_override():
        return [override.value()]
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else []


def _problems(o: RunOptions) -> Iterator[str]:
    """Everything wrong with the values, alone and together."""
    for option, (allowed, test) in _RANGES.items():
        value: Any = o
        for part in option.split("."):
            value = getattr(value, part)
        if not test(value):
            yield f"{option}={value}: must be {allowed}"
    yield from check_model(o.model)
    yield from corpus_problems(o.corpus)
    yield from tokenizer_problems(o.tokenizer)
    yield from partition_problems(o.partition)
    if o.corpus.public == 0 and o.tokenizer.name == "bpe":
        yield "corpus.public=0: tokenizer=bpe is trained on the public part; raise it or take tokenizer=bytes"
    if o.local.min_lr > o.local.lr > 0:
        yield f"local.min_lr={o.local.min_lr}: must not be above local.lr={o.local.lr}; lower it"
    yield from fleet.fleet_problems(o)
    yield from attack.attack_problems(o)
    yield from update_problems(o.update)
    yield from trust.validate_problems(o)
    if o.checkpoint.journal and o.clock == "virtual":
        yield "checkpoint.journal=true: clock=virtual repeats a run to the same bits without one; leave it out"
    if o.resume is not None:
        yield f"resume={o.resume}: stands alone (fedgpt run resume=<folder>); the folder holds its own options"
    try:
        strategy = build_strategy(o.strategy, o.trusted_packages)
    except ConfigError as error:
        yield from error.problems
    else:
        yield from pace_problems(o.pace, getattr(strategy, "switches", False))
        yield from _pacing_problems(o, strategy)
        yield from privacy.privacy_problems(o, strategy)


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
