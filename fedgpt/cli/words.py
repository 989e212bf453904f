"""The arguments of `fedgpt run`, `data`, `privacy plan` and `audit`, and of a server's runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedgpt.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fedgpt.flower.deploy.queue import Wish

OF_RUNTIMES = ("runtime", "runtime.name", "runtime._target_", "runtime.workers")


def split_words(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return (typed options, the user's folder of groups); raises ConfigError for any other
    word.
    """
    config_dir = value_of(arguments, "--config-dir", "-cd")
    shown = value_of(arguments, "--cfg", "-c")
    words = [a for a in arguments if not a.startswith("-") and a not in (config_dir, shown)]
    if wrong := [word for word in words if "=" not in word and not word.startswith("~")]:
        raise ConfigError(
            f"{word}: options are typed key=value{nearest(word, ['rounds=20', 'model=nano'])}"
            for word in wrong
        )
    return words, config_dir


def value_of(arguments: list[str], *flags: str) -> str | None:
    """The value of a flag, typed `--flag value` or `--flag=value`; None if it is not typed."""
    for at, argument in enumerate(arguments):
        for flag in flags:
            if argument.startswith(f"{flag}="):
                return argument.partition("=")[2]
            if argument == flag and at + 1 < len(arguments):
                return arguments[at + 1]
    return None


def server_run(words: Sequence[str], config_dir: str | None, folder: Path) -> Wish:
    """The options of a run at the server of a folder; the run's folder is in it unless it is named.

    Raises ConfigError for all that `fedgpt run` refuses, and for a runtime.
    """
    from fedgpt.api import resumed
    from fedgpt.config import compose
    from fedgpt.flower.deploy.link_process import continued_at
    from fedgpt.flower.deploy.queue import Wish

    if found := resumed(words):
        return Wish(found[0], dated=False, resumed=True)
    words, _ = split_words(list(words))
    for word in words:
        if word.lstrip("+~").partition("=")[0] in OF_RUNTIMES:
            raise ConfigError(f"{word}: the clients of a server are its sites; leave it out")
    if any(word.startswith("run_dir=") for word in words):
        options = compose.load(words, config_dir)
        with continued_at(folder):
            compose.refuse_another_run(options)
        return Wish(options, dated=False, resumed=False)
    begin = f"run_dir={folder}/runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    options = compose.load([*words, f"{begin}-${{name}}"], config_dir)
    return Wish(options, dated=True, resumed=False)
