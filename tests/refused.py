"""What the configuration says of options that it refuses."""

from __future__ import annotations

import pytest

from fedgpt import config
from fedgpt.core.errors import ConfigError


def problems(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(words)
    return caught.value.problems
