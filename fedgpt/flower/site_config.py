"""The site of a node, from its node configuration.

    --node-config 'name="clinic-a" text="/srv/notes" state-dir="/var/lib/fedgpt"'

`fedgpt client` passes the same names and values as a SuperNode does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgpt.client.site import Site
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import CorpusOptions

DEVICES = ("auto", "cpu", "cuda")


def site_of(node_config: Mapping[str, Any]) -> Site | None:
    """The site that a node is; None for a node that has no text of its own.

    Raises ConfigError for a missing or wrong value.
    """
    if "text" not in node_config:
        return None
    given = {key: str(value) for key, value in node_config.items()}
    problems = [
        f"--node-config {name} is missing; it is {what}"
        for name, what in (
            ("name", "the name of this site, as the server has approved it"),
            ("state-dir", "a folder of this site for the state of runs"),
        )
        if not given.get(name)
    ]
    device = given.get("device", "auto")
    if device not in DEVICES:
        problems.append(f"--node-config device={device}: must be auto, cpu or cuda")
    if problems:
        raise ConfigError(problems)
    state = Path(given["state-dir"]).expanduser()
    corpus = CorpusOptions(name="files", client="file", path=given["text"])
    cache = given.get("cache-dir") or str(state / "cache")
    return Site(given["name"], corpus, str(state), cache, device)
