"""Simulated attackers, for research on robust strategies: they send a manipulated update.

Each attacker acts alone and knows only its own update; there are no colluding attackers.
"""

from __future__ import annotations

import numpy as np

from fedgpt.core.options import AttackOptions
from fedgpt.core.seeds import numpy_generator


def attacked(
    delta: np.ndarray, options: AttackOptions, seed: int, client: str, number: int
) -> np.ndarray:
    """The delta that an attacker sends instead of its `delta`, (parameters,) float32.

    The same job gives the same bits.

    >>> flip = AttackOptions("sign_flip", clients=1, strength=3.0)
    >>> attacked(np.ones(2, np.float32), flip, 0, "eve", 0)
    array([-3., -3.], dtype=float32)
    """
    strength = np.float32(options.strength)
    if options.name == "sign_flip":
        return -strength * delta
    if options.name == "scale":
        return strength * delta
    noise = numpy_generator(seed, "attack", client, number).standard_normal(delta.size, np.float32)
    return noise * (strength * np.linalg.norm(delta) / np.linalg.norm(noise))
