"""The demo, `experiment=demo`, on the text that it comes with."""

from __future__ import annotations

import pytest
from support.world import summary


@pytest.mark.long
def test_the_demo_learns(world):
    """Measured: from 2.908 bits per byte to 2.132 in six rounds."""
    folder = world.root / "demo"
    world.fedgpt("run", "experiment=demo", "rounds=6", f"run_dir={folder}")
    found = summary(folder)
    assert found["initial"]["bits_per_byte"] > 2.8
    assert found["final"]["bits_per_byte"] < 2.3
