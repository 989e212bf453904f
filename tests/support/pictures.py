"""A check for the tests of figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image


def is_picture(path: Path) -> bool:
    """Whether a file is an image of some size that is not empty."""
    pixels = matplotlib.image.imread(path)
    return min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01
