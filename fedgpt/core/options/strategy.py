"""Options of the group `strategy` that belong to no built-in rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, option


@dataclass
class StrategyOptions(Group):
    """A rule from outside; the options of a built-in one are the fields of its class, which is in
    aggregate/.
    """

    group = "strategy"

    _target_: str | None = option(
        None,
        "custom: full name of a class of your own, such as my_package.Mine, whose package must be"
        " named in trusted_packages. flower: full name of one of Flower's strategies.",
    )
    arguments: dict[str, Any] = option(
        {}, "custom: arguments by name that the class is called with, such as {eta: 2}."
    )
