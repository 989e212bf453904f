"""Tests as a user who may not read everything, even if root runs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def folder_of_root() -> Iterator[Path]:
    """A folder that every user can search; whoever runs the tests is root again at the end."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            yield Path(name)
        finally:
            if os.getuid() == 0:
                os.seteuid(0)
            for path in Path(name).rglob("*"):
                path.chmod(0o755)


def become_nobody() -> None:
    """End root's right to read everything, until the end of folder_of_root."""
    if os.getuid() == 0:
        os.seteuid(NOBODY)
