"""The problems that the configuration reports for wrong options."""

from __future__ import annotations

import pytest

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.load(words)
    return caught.value.problems
