"""A server's folder and sites for the tests of a deployment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.link import Fleet


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with room for the path of a server's socket, for which tmp_path may be too long."""
    with tempfile.TemporaryDirectory(prefix="fedgpt-") as folder:
        yield Path(folder)


@pytest.fixture
def fleet(tmp_path) -> Fleet:
    """A SuperLink's app behind its guard, with all of its sites connected."""
    one = Fleet(tmp_path)
    for site in one.sites:
        assert one.activate(site).status == 200
    return one
