"""Simulated attackers, for research on robust strategies: they send a manipulated update.

Each attacker acts alone and knows only its own update; there are no colluding attackers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedgpt.core.options import AttackOptions, RunOptions
from fedgpt.core.seeds import numpy_generator

NAMES = ("none", "sign_flip", "scale", "gaussian")


def attack_problems(o: RunOptions) -> Iterator[str]:
    """Attackers without an attack, an attack without attackers, more attackers than clients."""
    name, clients = o.attack.name, o.attack.clients
    if name == "none" and clients:
        yield (
            f"attack.clients={clients}: attack=none has no attackers; choose"
            f" attack={'|'.join(NAMES[1:])}"
        )
    if name in NAMES[1:] and clients == 0:
        yield f"attack.clients=0: attack={name} needs attackers; say how many, or take attack=none"
    if 0 < o.partition.clients < clients:
        yield (
            f"attack.clients={clients}: more than the partition.clients={o.partition.clients}"
            " there are"
        )


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
