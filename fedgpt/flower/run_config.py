"""A run as Flower's app: its options in Flower's flat run config, and an app without code."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from fedgpt.config import compose
from fedgpt.config.of_server import options_of_server
from fedgpt.core.errors import ConfigError
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


@lru_cache(maxsize=2)
def _of_server(text: str) -> RunOptions | tuple[str, ...]:
    """The options, or what is wrong with them: each message of a run comes with its options."""
    try:
        return options_of_server(text)
    except ConfigError as error:
        return tuple(error.problems)


def options_of_server_run(run_config: Mapping[str, Any]) -> RunOptions:
    """The options in a run config as a site reads them; raises ConfigError.

    Nothing that the server has sent is imported, resolved or opened.
    """
    text = str(run_config.get("config", ""))
    if not text.strip():
        raise ConfigError(
            "the run has its options as overrides, which a site does not read; start it with fedgpt"
            " server or fedgpt submit"
        )
    options = _of_server(text)
    if isinstance(options, tuple):
        raise ConfigError(options)
    if not options.corpus.at_sites:
        raise ConfigError(
            f"corpus={options.corpus.name}: the server names the text of this run, and this site"
            " trains on its own text only; use corpus=site"
        )
    return options
