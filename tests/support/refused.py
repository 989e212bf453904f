"""What the configuration says of options that it refuses."""

from __future__ import annotations

import pytest

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.load(words)
    return caught.value.problems
