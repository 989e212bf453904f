"""The arguments of `fedgpt run`, `data`, `privacy plan` and `audit`."""

from __future__ import annotations

from fedgpt.core.errors import ConfigError, nearest


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
