"""Flower's flat run config as our options: a whole YAML text, or Hydra overrides for `flwr run .
-c`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fedgpt.config import compose
from fedgpt.core.options import RunOptions


def options_of(run_config: Mapping[str, Any]) -> RunOptions:
    """Options of a run: `config` is resolved YAML (what our launcher sends); else `overrides` are
    composed here.
    """
    text = str(run_config.get("config", ""))
    if text.strip():
        return compose.from_yaml(text)
    return compose.load(shlex.split(str(run_config.get("overrides", ""))))
