"""A run's options in Flower's flat run config."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fedgpt.config import compose
from fedgpt.core.options import RunOptions


def run_config_of(options: RunOptions) -> dict[str, Any]:
    """The run config that fedgpt's launcher sends: all options as one YAML text."""
    return {"config": compose.to_yaml(options)}


def options_of(run_config: Mapping[str, Any]) -> RunOptions:
    """The options in a run config.

    `config` is the YAML text of fedgpt's launcher. If it is empty, `overrides` (of `flwr run . -c`)
    are composed here.
    """
    text = str(run_config.get("config", ""))
    if text.strip():
        return compose.from_yaml(text)
    return compose.load(shlex.split(str(run_config.get("overrides", ""))))
