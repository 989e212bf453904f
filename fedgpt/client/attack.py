"""Clients that lie, for research on robust rules: what they send instead of the update they
trained.

Each attacker acts alone and knows its own update only; attacks of clients that agree on one are not
here.
"""

from __future__ import annotations

import numpy as np

from fedgpt.core.options import AttackOptions
from fedgpt.core.seeds import numpy_generator


def attacked(
    delta: np.ndarray, options: AttackOptions, seed: int, client: str, number: int
) -> np.ndarray:
    """What an attacker sends for its `delta`, (parameters,) float32; the same job gives the same
    bits.

    >>> attacked(np.ones(2, np.float32), AttackOptions("sign_flip", clients=1, strength=3.0), 0, "eve", 0)
    array([-3., -3.], dtype=float32)
    """
    strength = np.float32(options.strength)
    if options.name == "sign_flip":
        return -strength * delta
    if options.name == "scale":
        return strength * delta
    noise = numpy_generator(seed, "attack", client, number).standard_normal(delta.size, np.float32)
    return noise * (strength * np.linalg.norm(delta) / np.linalg.norm(noise))
