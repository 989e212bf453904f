"""What a site is: its name, its text, and the places of its state and cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedgpt.core.options import CorpusOptions


@dataclass(frozen=True)
class Site:
    """A site as its own command and policy describe it; nothing of it comes from a server."""

    name: str
    text: CorpusOptions  # corpus=files with the site's path and fields
    state_dir: Path
    cache_dir: Path
    device: str = "auto"
