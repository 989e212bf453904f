"""The arguments of `fedgpt run`, `data`, `privacy plan` and `audit`, and of a server's runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fedgpt.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fedgpt.core.options import RunOptions
    from fedgpt.flower.deploy.queue import Wish

OF_RUNTIMES = ("runtime", "runtime.name", "runtime._target_", "runtime.workers")


class Flag(NamedTuple):
    """A flag, and what is typed after it."""

    takes: str = ""  # in words; empty: nothing
    choices: tuple[str, ...] = ()  # all values, if they are few

    def problem(self, name: str, equals: str, value: str) -> str:
        """What is wrong with the flag as it is typed; empty where it is right."""
        if not self.takes:
            return f"{name}{equals}{value}: takes no value; type {name}" if equals else ""
        if not value:
            return f"{name}: {self.takes} must follow"
        if self.choices and value not in self.choices:
            return f"{name} {value}: must be {self.takes}"
        return ""


CONFIG_DIR = Flag("a folder with groups of your own")
CFG = Flag("job, hydra or all", ("job", "hydra", "all"))
FLAGS = {"--config-dir": CONFIG_DIR, "-cd": CONFIG_DIR}
FLAGS_OF_RUN = {
    **FLAGS,
    **{"--cfg": CFG, "-c": CFG, "--resolve": Flag()},
    **{"-m": Flag(), "--multirun": Flag()},
}


def split_words(
    arguments: list[str], flags: Mapping[str, Flag] = FLAGS
) -> tuple[list[str], str | None]:
    """Return (typed options, the user's folder of groups); raises ConfigError for any other word,
    and for a flag that is not one of `flags`.
    """
    words: list[str] = []
    problems: list[str] = []
    config_dir = None
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
            if not equals and not word.startswith("~"):
                near = nearest(word, ["rounds=20", "model=nano"])
                problems.append(f"{word}: options are typed key=value{near}")
            continue
        if name not in flags:
            problems.append(_no_flag(word, rest, flags))
            continue
        if flags[name].takes and not equals and rest:
            value = rest.pop(0)
        problems += filter(None, [flags[name].problem(name, equals, value)])
        config_dir = value if flags[name] is CONFIG_DIR else config_dir
    if problems:
        raise ConfigError(problems)
    return words, config_dir


def _no_flag(word: str, rest: list[str], flags: Mapping[str, Flag]) -> str:
    """The problem of an unknown flag; takes the value of an option that is typed like a flag from
    `rest`.
    """
    from fedgpt.config.choices import groups
    from fedgpt.core.options import OPTIONS

    name, equals, value = word.partition("=")
    option = name.lstrip("-").replace("-", "_")
    if option in OPTIONS or option in groups():
        if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            value = rest.pop(0)
            word = f"{word} {value}"
        return f"{word}: options are typed without dashes; type {option}={value or 'VALUE'}"
    near = nearest(name, flags) or nearest(option, OPTIONS)
    return (
        f"{word}: no such flag; this command has {', '.join(flags)}, and options are typed"
        f" key=value{near}"
    )


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
    named = any(word.startswith("run_dir=") for word in words)
    if not named:
        begin = f"run_dir={folder}/runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
        words = [*words, f"{begin}-${{name}}"]
    options = compose.load(words, config_dir)
    if named:
        with continued_at(folder):
            compose.refuse_another_run(options)
    _check_text(options)
    return Wish(options, dated=not named, resumed=False)


def _check_text(options: RunOptions) -> None:
    """Raise ConfigError if the server's own text is missing; warn if no site would take part."""
    from fedgpt.data.corpora.site import Site
    from fedgpt.data.corpus import corpus_of

    if not options.corpus.at_sites:
        print(
            f"fedgpt: corpus={options.corpus.name}: clients started with fedgpt client take part"
            " only with corpus=site; this run is for Flower's SuperNodes",
            file=sys.stderr,
        )
        return
    corpus = corpus_of(options.corpus)
    assert isinstance(corpus, Site), "the class of corpus=site"
    for folder in corpus.folders:
        folder.files()
