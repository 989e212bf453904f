"""A real SuperLink for the tests of a server and its clients over a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.superlink import LiveSuperLink, live_superlink

from fedgpt.flower import fetch


@pytest.fixture
def link(monkeypatch) -> Iterator[LiveSuperLink]:
    monkeypatch.setattr(fetch, "NODES_SECONDS", 0.1)
    with live_superlink() as one:
        yield one
