"""The site of a node, from its node configuration.

    --node-config 'name="clinic-a" text="/srv/notes" state-dir="/var/lib/fedgpt"'

`fedgpt client --stock` writes them to a file, which Flower reads as TOML and without a limit on
quotes and spaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedgpt.client.site import Site
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import CorpusOptions
from fedgpt.core.options.option import field_problems

DEVICES = ("auto", "cpu", "cuda")
# how a site's text is read: name in a node configuration -> option of corpus=files
TEXT = {
    "text-field": "text_field",
    "label-field": "label_field",
    "bad-records": "bad_records",
    "document-bytes": "document_bytes",
}


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
    read = {option: node_config[name] for name, option in TEXT.items() if name in node_config}
    problems += [_as_typed(one) for one in field_problems(CorpusOptions, read, "corpus")]
    if problems:
        raise ConfigError(problems)
    corpus = CorpusOptions(name="files", client="file", path=given["text"], **read)
    state = Path(given["state-dir"]).expanduser()
    cache = given.get("cache-dir") or str(state / "cache")
    return Site(given["name"], corpus, str(state), cache, device)


def config_of(site: Site) -> dict[str, str | int]:
    """The node configuration of a site, from which `site_of` makes the same site."""
    own: dict[str, str | int] = {"name": site.name, "text": str(Path(site.corpus.path or ""))}
    own |= {"state-dir": site.state_dir, "cache-dir": site.cache_dir, "device": site.device}
    read = {name: getattr(site.corpus, option) for name, option in TEXT.items()}
    return own | {name: value for name, value in read.items() if value is not None}


def _as_typed(problem: str) -> str:
    """A problem of corpus=files, with the names of a node configuration."""
    for name, option in TEXT.items():
        problem = problem.replace(f"corpus.{option}=", f"--node-config {name}=")
    return problem
