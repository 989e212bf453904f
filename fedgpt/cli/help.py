"""`fedgpt help`: commands, groups and options explained, from the list of commands, conf/ and the
fields of the options.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import chain
from textwrap import wrap
from typing import Any

from fedgpt.cli import COMMANDS
from fedgpt.cli.words import value_of
from fedgpt.config.choices import Choice, defaults, groups, read_choice
from fedgpt.core.errors import nearest
from fedgpt.core.members import modules_in
from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import Group, Option, one_of, options_of, typed
from fedgpt.core.targets import load_class

HELP = """
  fedgpt help                 all commands and groups
  fedgpt help run             all options of a run
  fedgpt help privacy         the choices and options of one group
  fedgpt help model=micro     one choice; its name alone is enough
  fedgpt help pace.goal       one option
  fedgpt help strategy.eta    one option, for each strategy that has it
"""
EXPERIMENT = "Settings of many groups at once."
COLUMN = 24  # column at which the meaning of a command, group or choice starts
STEP = 6  # indentation of the meaning of an option, in characters
RULES = "fedgpt.aggregate"  # the package of the built-in strategies


def main(arguments: list[str]) -> int:
    """Print the help of topics; returns 2 if one is not a command, group, choice or option."""
    config_dir = value_of(arguments, "--config-dir", "-cd")
    words = _topics([a for a in arguments if not a.startswith("-") and a != config_dir])
    parts = {word: _explained(word, config_dir) for word in words}
    if unknown := [word for word, part in parts.items() if not part]:
        known = groups(config_dir)
        everything = dict.fromkeys(
            [
                *COMMANDS,
                *known,
                *chain(*known.values()),
                *OPTIONS,
                *_options_of_strategies(config_dir),
            ]
        )
        for word in unknown:
            more = nearest(word, everything)
            print(f"fedgpt help {word}: no command, group, choice or option{more}", file=sys.stderr)
        return 2
    text = "\n\n".join(parts.values()) if parts else overview()
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `fedgpt run --help | head`; Python would report it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def overview() -> str:
    """The commands, and the groups with their choices."""
    lines = [_bold("fedgpt: federated training of small GPTs"), ""]
    for command in COMMANDS.values():
        lines += _row(command.usage, command.help, column=36)
    lines += _row("fedgpt --version", "print the version", column=36)
    lines += [
        "",
        *_paragraph(
            "Groups and their choices, the default first; fedgpt help GROUP explains a group:"
        ),
    ]
    for group, names in groups().items():
        lines += _row(group, ", ".join(names), column=14)
    lines += ["", *_paragraph("fedgpt run --help lists every option with its default and meaning.")]
    return "\n".join(lines)


def _topics(words: list[str]) -> list[str]:
    """The words without those that belong to the command before them, as in `privacy plan`."""
    return [
        word
        for last, word in zip(["", *words], words, strict=False)
        if last not in COMMANDS or word not in COMMANDS[last].arguments.split()
    ]


def _explained(word: str, config_dir: str | None) -> str:
    known = groups(config_dir)
    parts = []
    if word in COMMANDS:
        parts.append(_command(word, config_dir))
    if word in known:
        parts.append(_group(word, known[word], config_dir))
    for group, names in known.items():
        parts += [
            "\n".join(_choice(group, name, config_dir))
            for name in names
            if word in (name, f"{group}={name}")
        ]
    if word in OPTIONS and word not in known:
        parts.append("\n".join(_option(OPTIONS[word])))
    elif word.startswith("strategy."):
        found = _options_of_strategies(config_dir).get(word, [])
        parts += ["\n".join(line for one in found for line in _option(one))][: len(found)]
    return "\n\n".join(parts)


def _command(name: str, config_dir: str | None) -> str:
    command = COMMANDS[name]
    if command.parses_help:
        command.module.main(["--help"])
    lines = [_bold(command.usage), *_paragraph(f"{command.help[0].upper()}{command.help[1:]}.")]
    lines.append(command.module.HELP.rstrip())
    if name == "run":
        top = [one for one in OPTIONS.values() if not one.group and one.kinds]
        lines += ["", _title("run", str(RunOptions.__doc__)), ""]
        lines += [line for one in top for line in _option(one)]
        for group, names in groups(config_dir).items():
            lines += ["", _group(group, names, config_dir)]
    return "\n".join(lines)


def _group(group: str, names: list[str], config_dir: str | None) -> str:
    """The choices of a group, the options that each of them sets, and the options of the group."""
    lines = [_title(group, _meaning(group)), ""]
    for name in names:
        lines += _choice(group, name, config_dir)
    options = [one for one in OPTIONS.values() if one.group == group]
    return "\n".join(
        [*lines, *[""][: len(options)], *[line for one in options for line in _option(one)]]
    )


def _choice(group: str, name: str, config_dir: str | None) -> Iterator[str]:
    """`group=choice` and its meaning, and below them the options that it sets."""
    choice = read_choice(group, name, config_dir)
    default = " (default)" if defaults().get(group) == name else ""
    yield from _row(f"{group}={name}", f"{choice.meaning}{default}")
    if (own := _options_of_strategy(choice)) is not None:
        for one in own:
            yield from _option(one, indent=4)
    elif sets := _sets(choice):
        yield from _paragraph(f"Sets {sets}.", COLUMN, _dim)
    if group == "runtime":
        yield from _limits(choice)


def _sets(choice: Choice) -> str:
    """The options that a choice sets to other values than the defaults, without the choice's
    name.
    """
    kind = _class_of(choice.group)
    own_name = kind.key(kind.choice_field) if kind else ""
    return ", ".join(
        f"{key}={typed(value)}"
        for key, value in choice.sets.items()
        if key != own_name and (key not in OPTIONS or OPTIONS[key].default != value)
    )


def _options_of_strategy(choice: Choice) -> list[Option] | None:
    """The fields of a built-in strategy, with the values of its file; None for what is not one."""
    target = str(choice.sets.get("strategy._target_", ""))
    if not target.startswith(f"{RULES}."):
        return None
    cls = load_class("strategy", target, (RULES,))
    return [
        replace(one, default=choice.sets.get(one.key, one.default))
        for one in options_of(cls, "strategy")
    ]


def _options_of_strategies(config_dir: str | None) -> dict[str, list[Option]]:
    """As typed -> that option of the strategies that have it, those that have the same together."""
    found: dict[str, dict[Any, Option]] = {}
    for name in groups(config_dir)["strategy"]:
        for one in _options_of_strategy(read_choice("strategy", name, config_dir)) or ():
            alike = found.setdefault(one.key, {})
            shown = (one.default, one.facts.help, _values(one))
            names = alike[shown].facts.only_with if shown in alike else ()
            alike[shown] = replace(one, facts=replace(one.facts, only_with=(*names, name)))
    return {key: list(alike.values()) for key, alike in found.items()}


def _limits(choice: Choice) -> Iterator[str]:
    """What a built-in runtime cannot do; that of a user is not known here."""
    from fedgpt.core.runtimes import RUNTIMES

    name = choice.sets.get(RUNTIMES.key)
    if name in RUNTIMES.names():
        for limit in RUNTIMES.load(name).limits:
            yield from _paragraph(limit, COLUMN)


def _meaning(group: str) -> str:
    """The meaning of a group, from the docstring of its class."""
    if kind := _class_of(group):
        return str(kind.__doc__).partition("\n\n")[0]
    return OPTIONS[group].facts.help if group in OPTIONS else EXPERIMENT


def _class_of(group: str) -> type[Group] | None:
    """The class of a group; None for strategy and experiment, which have none."""
    kinds = [field.default_factory for field in fields(RunOptions)]
    return next((k for k in kinds if isinstance(k, type) and k.group == group), None)


def _option(one: Option, indent: int = 0) -> Iterator[str]:
    """`option=default` and its allowed values, and below them its meaning."""
    shown = one.key if one.default == "" else f"{one.key}={typed(one.default)}"
    first, *rest = _row(" " * indent + shown, _values(one), column=COLUMN + 10 + indent)
    yield first.replace(one.key, _bold(one.key), 1)
    yield from rest
    names = one_of(*one.facts.only_with).words if one.facts.only_with else ""
    only = f" Only with {one.group}={names}." if names else ""
    members = (
        f" Built in: {', '.join(modules_in(folder))}." if (folder := one.facts.built_in) else ""
    )
    yield from _paragraph(f"{one.facts.help}{members}{only}", STEP + indent)


def _values(one: Option) -> str:
    """The values of an option in words: its type, unit and range, or its choices."""
    null = " or null" if type(None) in one.kinds else ""
    allowed, unit = one.facts.allowed, one.facts.unit
    if allowed.choices:
        return f"{allowed.words}{null}"
    kind = one.kind.removesuffix(" or null").partition(", such as")[0].removeprefix("a ")
    of = f" of {unit}" if unit else ""
    words = allowed.words.replace(f" {unit}", "") if unit else allowed.words
    return f"{kind}{of}{null}{f', {words}' if words else ''}"


# ---- lines of text that fit the terminal


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size().columns))


def _title(name: str, meaning: str) -> str:
    text = f"{name}: {' '.join(meaning.split())}"
    first, *rest = wrap(text, _width())
    bold = _bold(name) + first.removeprefix(name)
    return "\n".join([bold, *rest])


def _row(name: str, meaning: str, column: int = COLUMN) -> list[str]:
    """A name, and its meaning beside it, or below it if the name is too long."""
    text = wrap(meaning, _width() - column)
    start = f"  {name}"
    if len(start) + 2 > column:
        return [start, *(" " * column + line for line in text)]
    first, *rest = text or [""]
    return [f"{start:<{column}}{first}".rstrip(), *(" " * column + line for line in rest)]


def _paragraph(text: str, indent: int = 0, style: Any = str) -> list[str]:
    lines = wrap(" ".join(text.split()), _width() - indent, break_on_hyphens=False)
    return [" " * indent + style(line) for line in lines]


def _bold(text: str) -> str:
    return _styled(text, "1")


def _dim(text: str) -> str:
    return _styled(text, "2")


def _styled(text: str, code: str) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"
