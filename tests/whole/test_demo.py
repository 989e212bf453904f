"""The first thing that a user runs, on its own text."""

from __future__ import annotations

import pytest
from support.world import summary


@pytest.mark.slow
def test_the_demo_learns(world):
    """From 2.908 bits per byte to 2.132 in six rounds."""
    folder = world.root / "demo"
    world.fedgpt("run", "experiment=demo", "rounds=6", f"run_dir={folder}")
    told = summary(folder)
    assert told["initial"]["bits_per_byte"] > 2.8
    assert told["final"]["bits_per_byte"] < 2.3
