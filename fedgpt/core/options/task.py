"""Options of the group `task`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import Group, arguments, member, target


@dataclass
class TaskOptions(Group):
    """What the model learns to do: how text becomes batches, and what loss and scores are."""

    group = "task"

    name: str = member("lm")
    _target_: str | None = target()
    arguments: dict[str, Any] = arguments()
