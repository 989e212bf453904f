"""The commands: run, data, privacy, audit, generate."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgpt.core.errors import ConfigError, FedGPTError, Interrupted, StoppedEarly, nearest


def run(arguments: list[str]) -> int:
    """`fedgpt run`: Hydra's command line (overrides, -m, --cfg job, --config-dir) over conf/."""
    from fedgpt.api import resumed
    from fedgpt.config import compose, overrides

    if options := resumed(arguments):
        _start(options)
        return 0
    words, config_dir = _words(arguments)
    sweep = "-m" in arguments or "--multirun" in arguments
    if sweep and _value_of(arguments, "--cfg", "-c"):
        raise ConfigError(
            "--cfg: prints one configuration, and -m asks for several; leave one of them out"
        )
    if sweep:
        compose.precheck(words, config_dir)
    else:
        compose.load(words, config_dir)
    return _hydra(
        arguments,
        [overrides.readable(word, sweep) if word in words else word for word in arguments],
    )


def _words(arguments: list[str]) -> tuple[list[str], str | None]:
    """(options as typed, the user's folder of groups); raises ConfigError for what is neither."""
    config_dir = _value_of(arguments, "--config-dir", "-cd")
    shown = _value_of(arguments, "--cfg", "-c")
    words = [a for a in arguments if not a.startswith("-") and a not in (config_dir, shown)]
    if wrong := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ConfigError(
            f"{word}: options are typed key=value{nearest(word, ['rounds=20', 'model=nano'])}"
            for word in wrong
        )
    return words, config_dir


def _hydra(arguments: list[str], readable: list[str]) -> int:
    """Hand over to Hydra, which composes, sweeps, prints; each job comes back to `job`."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from fedgpt.config import compose, overrides

    failures: list[FedGPTError] = []

    def job(cfg: DictConfig) -> float | None:
        sys.argv = ["fedgpt", "run", *arguments]  # what command.txt holds: words that a shell takes
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN and not any(
            o.startswith("run_dir=") for o in settings.overrides.task
        ):
            cfg.run_dir = settings.runtime.output_dir
        if any(isinstance(error, Interrupted) for error in failures):
            return None
        try:
            return _start(compose.to_options(cfg))
        except (
            FedGPTError
        ) as error:  # Hydra would print a traceback; and a sweep goes on after a failed job
            print(f"fedgpt: {error}", file=sys.stderr)
            failures.append(error)
            return None

    sys.argv = ["fedgpt run", *readable]
    hydra.main(version_base="1.3", config_path=str(overrides.CONF), config_name="run")(job)()
    return exit_code(failures[-1]) if failures else 0


def _start(options: Any) -> float:
    """Run one configuration; returns what Hydra's sweepers minimise."""
    from fedgpt.flower.launch import launch

    launch(options)
    return sweep_score(Path(options.run_dir))


def sweep_score(folder: Path) -> float:
    """THE score of a finished run's last version, for a sweeper, which minimises it.

    A score of which higher is better is returned with a minus sign.
    """
    import json

    from fedgpt.core.score import Score

    summary = json.loads((folder / "summary.json").read_text())
    score = Score(summary["score"], summary["higher_is_better"])
    return score.to_minimise(summary["final"][score.name])


def data(arguments: list[str]) -> int:
    """`fedgpt data`: what a run with these options would use, without running it."""
    from rich.console import Console

    from fedgpt.config import compose
    from fedgpt.data.partition import partition
    from fedgpt.data.prepare import prepare
    from fedgpt.report.shards import data_report

    options = compose.load(*_words(arguments))
    prepared = prepare(
        options.corpus, options.tokenizer, options.cache_dir, options.trusted_packages
    )
    shards = partition(
        prepared,
        options.partition,
        options.seed,
        options.model.block_size + 1,
        options.trusted_packages,
    )
    data_report(prepared, shards, Console(highlight=False))
    return 0


def privacy(arguments: list[str]) -> int:
    """`fedgpt privacy plan`: what a private run with these options would cost, before anything
    runs.
    """
    from fedgpt.config import compose
    from fedgpt.data.partition import partition
    from fedgpt.data.prepare import prepare
    from fedgpt.report.privacy_plan import plan_text

    if not arguments or arguments[0] != "plan":
        raise ConfigError(
            f"fedgpt privacy {' '.join(arguments)}: the command is `fedgpt privacy plan [key=value ...]`"
        )
    options = compose.load(*_words(arguments[1:]))
    prepared = prepare(
        options.corpus, options.tokenizer, options.cache_dir, options.trusted_packages
    )
    shards = partition(
        prepared,
        options.partition,
        options.seed,
        options.model.block_size + 1,
        options.trusted_packages,
    )
    print(plan_text(options, [shard.size for shard in shards], prepared.tokenizer.vocab_size))
    return 0


def audit(arguments: list[str]) -> int:
    """`fedgpt audit`: attack what these options promise; exit code 1 where the promise does not
    hold.
    """
    from fedgpt.audit.report import audit_report
    from fedgpt.config import compose
    from fedgpt.data.partition import partition
    from fedgpt.data.prepare import prepare

    options = compose.load(*_words(arguments))
    prepared = prepare(
        options.corpus, options.tokenizer, options.cache_dir, options.trusted_packages
    )
    shards = partition(
        prepared,
        options.partition,
        options.seed,
        options.model.block_size + 1,
        options.trusted_packages,
    )
    strategy = compose.build_strategy(options.strategy, options.trusted_packages)
    text, holds = audit_report(options, strategy, prepared, shards)
    print(text)
    return 0 if holds else 1


def generate(arguments: list[str]) -> int:
    """`fedgpt generate RUN --prompt TEXT`: text from the newest model of a run."""
    parser = argparse.ArgumentParser(
        "fedgpt generate", description="Write text with a run's newest model."
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument(
        "--tokens", type=int, default=200, help="at most this many new tokens (200)"
    )
    parser.add_argument("--samples", type=int, default=1, help="how many continuations (1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 = greedy (0.8)")
    parser.add_argument(
        "--top-k", type=int, default=50, help="draw from this many likeliest tokens, 0 = all (50)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=None,
        help="draw from the likeliest tokens of this total mass",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--best",
        action="store_true",
        help="the weights with the lowest held-out loss, not the newest",
    )
    chosen = parser.parse_args(arguments)
    ranges = {
        "tokens": (0, math.inf),
        "samples": (1, math.inf),
        "temperature": (0, math.inf),
        "top_k": (0, math.inf),
        "top_p": (0, 1),
        "seed": (0, 2**63 - 1),
    }
    for name, (low, high) in ranges.items():
        value = getattr(chosen, name)
        if value is not None and not low <= value <= high:
            most = "" if high == math.inf else f" and at most {high}"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least {low}{most}")

    from fedgpt.api import open_run

    texts = open_run(chosen.run, chosen.best).generate(
        chosen.prompt,
        tokens=chosen.tokens,
        samples=chosen.samples,
        temperature=chosen.temperature,
        top_k=chosen.top_k or None,
        top_p=chosen.top_p,
        seed=chosen.seed,
    )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(chosen.prompt + text)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "data": data,
    "privacy": privacy,
    "audit": audit,
    "generate": generate,
}


def dispatch(command: str, arguments: list[str]) -> int:
    """Run a command; failures a user can act on are one message and an exit code, never a
    traceback.
    """
    if command not in COMMANDS:
        print(
            f"fedgpt: no command {command!r}{nearest(command, COMMANDS)} (fedgpt --help)",
            file=sys.stderr,
        )
        return 2
    if (here := str(Path.cwd())) not in sys.path:
        # as `python -m fedgpt` has it: where a user's own strategy._target_=mine.Rule is
        sys.path.append(here)
    # a stop request ends like Ctrl-C: checkpoint, 130
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return COMMANDS[command](arguments)
    except FedGPTError as error:
        print(f"fedgpt: {error}", file=sys.stderr)
        return exit_code(error)
    except KeyboardInterrupt:
        print("fedgpt: interrupted", file=sys.stderr)
        return 130


def exit_code(error: FedGPTError) -> int:
    """2 wrong usage, 3 stopped early for a stated reason, 130 interrupted and resumable, 1 anything
    else.
    """
    kinds = ((ConfigError, 2), (StoppedEarly, 3), (Interrupted, 130))
    return next((code for kind, code in kinds if isinstance(error, kind)), 1)


def _value_of(arguments: list[str], *flags: str) -> str | None:
    for at, argument in enumerate(arguments):
        for flag in flags:
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2]
            if argument == flag and at + 1 < len(arguments):
                return arguments[at + 1]
    return None
