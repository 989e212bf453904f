"""Fixtures of the tests of figures."""

from __future__ import annotations

import pytest


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves, in a list."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, *a, **more: (kept.append(figure), save(figure, *a, **more)),
    )
    return kept
