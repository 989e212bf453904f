"""The options of a run: Hydra composes them from conf/ and the typed options, and all problems are
reported at once.

This module does not import torch, so that errors are reported quickly. `_target_` is resolved only
inside an allow-list.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from fedgpt.aggregate.base import Strategy
from fedgpt.config import checks, overrides, pretrained
from fedgpt.config.clients import number_problems, pacing_problems
from fedgpt.config.texts import escaped, quoted
from fedgpt.core import members, targets
from fedgpt.core.errors import ConfigError, resume_command
from fedgpt.core.options import RunOptions, StrategyOptions, TaskOptions, option
from fedgpt.core.options.option import dotted
from fedgpt.core.runtimes import runtime_problems
from fedgpt.model.shape import trainable_problems
from fedgpt.privacy.problems import Rule, privacy_problems
from fedgpt.report.trackers import tracker_problems
from fedgpt.simulate.replay import replay_problems

TRUSTED = ("fedgpt.aggregate", "flwr.serverapp.strategy")
MOST_DIGITS = len(str(option.LARGEST))  # of a whole number
LENGTH = ("rounds", "tokens")  # options that may be raised when a run is resumed
# options that may change when a run is resumed, because they do not change its result
FREE = ("cache_dir", "run_dir", "runtime.workers", "track")


def load(
    words: Sequence[str] = (), config_dir: str | None = None, trains: bool = True
) -> RunOptions:
    """Options for `fedgpt run <words>`; raises ConfigError with every problem that was found.

    Without `trains`, as for `fedgpt data`, the run folder is not written, so it may be any.
    """
    _say_what_is_replaced(words)
    texts = [quoted(word) for word in words]
    problems, good, cfg = overrides.check_words(texts, config_dir)
    dropped = [text.partition("=")[0].lstrip("+~") for text in texts if text not in good]
    parsed = [OverridesParser.create().parse_override(text) for text in good]
    swept = [str(one.input_line) for one in parsed if one.is_sweep_override()]
    problems += [
        f"{text}: is a sweep, which is typed with -m (fedgpt run -m {text}); a text with commas is"
        " typed in quotes"
        for text in swept
    ]
    as_typed = dict(zip(texts, words, strict=True))
    typed = {one.key_or_group: as_typed[str(one.input_line)] for one in parsed}
    options = None
    try:
        options = to_options(cfg, True, trains)
        found = [*checks.unused_options(typed, options), *pretrained.replaced(typed, cfg)]
    except ConfigError as error:
        found = error.problems
    problems += [
        problem
        for problem in found
        if problem not in problems and not any(overrides.is_about(problem, o) for o in dropped)
    ]
    if problems or options is None:
        numbers = {
            f"{one.key_or_group}={shown}": as_typed[text]
            for one, text in zip(parsed, good, strict=True)
            for shown in _readings(one.value())
        }
        raise ConfigError(_as_typed(problem, as_typed | numbers) for problem in problems)
    return options


def _readings(value: Any) -> set[str]:
    """How messages show a number, or a list of numbers, of an option that may have fractions."""
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        return set()
    read = [float(one) if abs(one) < 10**300 else one for one in numbers]
    return {str(read), option.typed(read)} if isinstance(value, list) else {str(read[0])}


def _as_typed(problem: str, words: Mapping[str, str]) -> str:
    """The problem with its word as typed, where `words` (as read -> as typed) have it: without the
    quotes that Hydra needs, and 1e400 instead of inf.
    """
    text = problem.partition(": ")[0]
    return words.get(text, text) + problem[len(text) :]


def check_sweep(words: Sequence[str], config_dir: str | None = None) -> None:
    """Like load, for a sweep (`seed=0,1,2`): checks every job before the first one runs.

    A problem of every job is reported once; any other problem is reported with the first job that
    has it. At most MOST_JOBS jobs are checked.
    """
    _say_what_is_replaced(words)
    texts = [quoted(word, sweep=True) for word in words]
    problems, good, _ = overrides.check_words(texts, config_dir)
    found: dict[str, list[str]] = {}  # problem -> jobs that have it
    unused: dict[str, list[str]] = {}  # word -> a problem for each job in which it has no effect
    as_typed = dict(zip(texts, words, strict=True))
    typed = {text.partition("=")[0].lstrip("+"): as_typed[text] for text in good}
    jobs = list(overrides.jobs_of_sweep(good, config_dir))
    for job, compose_job in jobs:
        try:
            cfg = compose_job()
            options = to_options(cfg, on_this_machine=True)
        except ConfigError as error:
            for problem in error.problems:
                found.setdefault(problem, []).append(job)
        else:
            for problem in (
                *checks.unused_options(typed, options),
                *pretrained.replaced(typed, cfg),
            ):
                word = next(word for word in typed.values() if problem.startswith(f"{word}: "))
                unused.setdefault(word, []).append(problem)
    for problem, where in found.items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        shown = problem if len(where) == len(jobs) else f"{problem} (in the job {where[0]}{more})"
        problems += [shown] if problem not in problems else []
    # an option may have an effect with some of the choices only
    problems += [told[0] for told in unused.values() if len(told) == len(jobs)]
    if problems:
        raise ConfigError(_as_typed(problem, as_typed) for problem in problems)


def _say_what_is_replaced(words: Sequence[str]) -> None:
    """Print a line for each word that a later one replaces, as Hydra takes the last one."""
    last = {word.partition("=")[0].lstrip("+"): word for word in words}
    for word in words:
        if (later := last[word.partition("=")[0].lstrip("+")]) != word:
            print(f"fedgpt: {word} is replaced by {later}, which is typed later", file=sys.stderr)


def to_options(cfg: DictConfig, on_this_machine: bool = False, trains: bool = True) -> RunOptions:
    """Typed options of a composed configuration, checked one by one and against each other.

    With `on_this_machine` the run will start here. Without it only its folder is read, for example
    on a machine without Ray. Without `trains` no run folder is written.
    """
    options = _typed(cfg)
    problems: list[str] = []
    if options.model.from_init:
        try:
            pretrained.take_shape(options)
        except ConfigError as error:
            if options.init_from is None:  # without which other problems say nothing
                raise
            problems += error.problems
    problems += [p for p in _problems(options, on_this_machine, trains) if p not in problems]
    if problems:
        raise ConfigError(problems)
    return options


def _typed(cfg: DictConfig) -> RunOptions:
    """Options of the right types, with absolute paths; nothing else is checked."""
    try:
        options = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(_why(cfg, error)) from error
    assert isinstance(options, RunOptions), "the schema is the root of run.yaml"
    problems = [*checks.make_absolute(options), *checks.wrong_lists(options)]
    if problems:
        raise ConfigError(problems)
    return options


def _why(cfg: DictConfig, error: OmegaConfBaseException) -> str:
    """The option that cannot be converted, and why."""
    key = error.full_key or "configuration"
    reason = overrides.first_line(error)
    if not isinstance(error, InterpolationResolutionError):
        return f"{key}: {reason}"
    typed = dotted(cast(dict[str, Any], OmegaConf.to_container(cfg))).get(key, "")
    return f"{key}={typed}: {overrides.REFERENCE} ({reason})"


def to_yaml(options: RunOptions) -> str:
    """The resolved options as YAML, for config.yaml and for messages to clients."""
    values = _without_references(asdict(options))
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes values so that OmegaConf reads the same ones.

    PyYAML's own quotes lose a line break that is not a newline, and 1e5 is no number to it.
    """


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    needs_quotes = text[:1] in "+-.0123456789" or any(one in text for one in "\x85\u2028\u2029")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if needs_quotes else None)


_Dumper.add_representer(str, _write_text)


def _without_references(value: Any) -> Any:
    """The same value for the reader of YAML, which would resolve a `${` that means itself."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, list):
        return [_without_references(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_references(one) for key, one in value.items()}
    return value


def from_yaml(text: str, reading: bool = False) -> RunOptions:
    """Options from to_yaml's text; raises ConfigError if they do not match this version's
    schema.

    `reading`: nothing is to be run. Then values are checked, but no class of the user is imported.
    """
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunOptions), _mapping(text))
    except (OmegaConfBaseException, OverflowError) as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{key}: {overrides.first_line(error)}") from error
    assert isinstance(cfg, DictConfig), "as the schema is one"
    if not reading:
        return to_options(cfg)
    options = _typed(cfg)
    if problems := list(options.problems()) or list(trainable_problems(options.model)):
        raise ConfigError(problems)
    return options


def _mapping(text: str) -> DictConfig:
    try:
        cfg = OmegaConf.create(text)
    # OmegaConf raises AssertionError for a number alone
    except (OmegaConfBaseException, AssertionError, *overrides.YAML_ERRORS) as error:
        raise ConfigError(f"configuration: is not YAML ({overrides.first_line(error)})") from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ConfigError("configuration: is not a YAML mapping of options to values")
    return cfg


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def of_run(folder: Path, reading: bool = False) -> RunOptions:
    """The options in a run's folder; raises ConfigError if it is not a run's folder.

    `reading`: its model is to be used, not trained, so the user's own classes may be missing.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} is not a run's folder: it has no config.yaml")
    try:
        options = from_yaml(_text_of(path), reading)
    except ConfigError as error:
        raise ConfigError(f"{path}: {problem}" for problem in error.problems) from error
    options.run_dir = str(folder.resolve())
    return options


def flat_options(options: RunOptions) -> dict[str, Any]:
    """Dotted option -> value, for all options on which a run's result depends."""
    flat = _flat(OmegaConf.create(to_yaml(options)))
    return {key: value for key, value in flat.items() if key not in FREE}


def changed_options(before: Mapping[str, Any], options: RunOptions, group: str = "") -> str:
    """Differences between the options of a checkpoint and the current options, as `name: old ->
    new`. An option that does not exist in an older checkpoint has its default there. A run may have
    become longer, if it is not private. With `group`, such as `model.`, only those of this group.
    """
    now = flat_options(options)
    before = _with_new_options(before)
    return ", ".join(
        f"{k}: {before.get(k)} -> {now.get(k)}"
        for k in _differing(before, now)
        if k.startswith(group) and not _is_longer(k, before.get(k), options)
    )


def raised(options: RunOptions, typed: Mapping[str, str]) -> dict[str, int]:
    """The options of LENGTH in `typed` (name -> text) as numbers, for the run with `options`.

    Raises ConfigError if one of them may not be raised in this run.
    """
    more: dict[str, int] = {}
    problems = []
    for name, text in typed.items():
        now, other = getattr(options, name), "rounds" if options.tokens == 0 else "tokens"
        if options.privacy.unit != "none":
            problems.append(
                f"{name}={text}: the noise and the epsilon of this private run were planned for its"
                f" length ({other}={getattr(options, other)}), so it cannot be made longer; start"
                " another run with a plan of its own"
            )
        elif name != other:
            problems.append(
                f"{name}={text}: the length of this run is given by"
                f" {other}={getattr(options, other)}; raise that option"
            )
        elif not text.isascii() or not text.isdigit() or len(text) > MOST_DIGITS or int(text) < now:
            problems.append(
                f"{name}={text}: must be a whole number of at least {now}, the length of this run,"
                " which can only be made longer"
            )
        else:
            more[name] = int(text)
    if problems:
        raise ConfigError(problems)
    return more


def with_length(before: Mapping[str, Any], options: RunOptions) -> dict[str, Any]:
    """The options of a checkpoint, with the length of the run as it is now."""
    return {**before, **{name: getattr(options, name) for name in LENGTH if name in before}}


def _is_longer(name: str, before: Any, options: RunOptions) -> bool:
    """Whether the run now has a larger length than a checkpoint says, and may have it."""
    if name not in LENGTH or options.privacy.unit != "none" or not isinstance(before, int):
        return False
    return 0 < before < getattr(options, name)


def _with_new_options(before: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an older run, with the defaults of newer options."""
    return {**flat_options(RunOptions()), **before}


def _differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))


def refuse_another_run(options: RunOptions) -> None:
    """Raise ConfigError with the options that differ if `run_dir` contains a run with another
    configuration.
    """
    path = Path(options.run_dir) / "config.yaml"
    if not path.exists():
        return
    try:
        before = _with_new_options(_flat(_mapping(_text_of(path))))
    except ConfigError as error:
        raise ConfigError(
            f"run_dir={options.run_dir}: its config.yaml is damaged ({error.problems[0]})"
        ) from error
    differing = [k for k in _differing(before, flat_options(options)) if k not in FREE]
    if differing:
        raise ConfigError(
            f"run_dir={options.run_dir}: contains another run, which differs in"
            f" {', '.join(differing)}; name another run_dir, or continue that run with:"
            f" {resume_command(options.run_dir)}"
        )


def build_strategy(node: Any, trusted: Iterable[str] = ()) -> Any:
    """The object that `strategy` names: its `_target_` class called with the other keys, or with
    the `arguments` of strategy=custom.

    Only classes of fedgpt, Flower's strategies and `trusted_packages` are imported.
    """
    if isinstance(node, Mapping) and "arguments" in node:
        return _own_strategy(node, trusted)
    return targets.build("strategy", node, TRUSTED, trusted)


def _own_strategy(node: Mapping[str, Any], trusted: Iterable[str]) -> Strategy:
    """The object of strategy=custom; problems name its options as they are typed."""
    arguments = members.arguments_of("strategy", node["arguments"])
    if more := [name for name in node if name not in asdict(StrategyOptions())]:
        raise ConfigError(
            f"strategy.{name}={node[name]}: is an argument of a class of your own; type"
            f" strategy.arguments.{name}={node[name]}"
            for name in more
        )
    cls = targets.custom_class("strategy", Strategy, node["_target_"], (*TRUSTED, *trusted))
    return targets.call("strategy.arguments", cls, arguments)


def _problems(o: RunOptions, on_this_machine: bool, trains: bool) -> Iterator[str]:
    """All problems of single values and of combinations."""
    wrong = list(checks.problems(o))
    yield from wrong
    if on_this_machine:
        yield from checks.folder_problems(o, trains)
        if not any(problem.startswith(("model.", "tokenizer.vocab_size=")) for problem in wrong):
            yield from checks.memory_problems(o)
        yield from runtime_problems(o, o.partition.clients if o.partition.name != "natural" else 0)
    try:
        strategy = build_strategy(o.strategy, o.trusted_packages)
    except ConfigError as error:
        yield from error.problems
    else:
        switches = getattr(strategy, "switches", False)
        yield from o.pace.rules_of_pacing(switches)
        yield from replay_problems(o, switches)
        # numbers of clients are computed from pace.*, so check pace.* before the strategy
        if not any(problem.startswith("pace.") for problem in wrong):
            yield from pacing_problems(o, strategy, max(0, o.partition.clients))
        if o.partition.clients > 0:
            yield from number_problems(o, o.partition.clients)
        if o.corpus.public == 0 and getattr(strategy, "needs_root", False):
            yield (
                f"corpus.public=0: strategy={strategy.name} trains the server's own update on the"
                " public part; raise it, or take another rule, such as strategy=median"
            )
        rule = Rule(type(strategy).__name__)  # a strategy of another library, such as Flower's
        if isinstance(strategy, Strategy):
            rule = Rule(strategy.name, strategy.linear, strategy.switches)
        yield from privacy_problems(o, rule)
    yield from tracker_problems(o)
    if o.task != TaskOptions() or o.metrics:
        yield from _task_problems(o)


def _task_problems(o: RunOptions) -> Iterator[str]:
    """Problems of building task and metrics; checked separately, because their classes import
    torch.
    """
    from fedgpt.evaluate.metrics.base import make_metrics
    from fedgpt.tasks.base import make_task

    try:
        task = make_task(o)
        make_metrics(o.metrics, o.trusted_packages, task.scoring)
    except ConfigError as error:
        yield from error.problems
    else:
        yield from targets.problems_of("task", task, o)


def _flat(cfg: Any) -> dict[str, Any]:
    """Dotted option -> value."""
    return dotted(cast(dict[str, Any], OmegaConf.to_container(cfg)))
