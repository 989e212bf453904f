"""Options of the group `task`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, arguments, member, target


@dataclass
class TaskOptions(Group):
    """The learning problem: the batches made from text, the loss and the scores."""

    group = "task"

    name: str = member("lm")
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()
