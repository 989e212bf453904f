"""A run as Flower's app: its options in Flower's flat run config, and an app without code."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from fedgpt.config import compose
from fedgpt.core.options import RunOptions

# the pyproject.toml of an app without code: Flower imports the components, which are installed
APP = """[project]
name = "fedgpt-run"
version = "0.1.0"
description = "One fedgpt run"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedgpt"

[tool.flwr.app.components]
serverapp = "fedgpt.flower.server_app:app"
clientapp = "fedgpt.flower.client_app:app"

[tool.flwr.app.config]
config = ""
overrides = ""
"""


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
