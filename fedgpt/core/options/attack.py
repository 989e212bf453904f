"""Options of the group `attack`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedgpt.core.options.option import Group, above, at_least, choice, option

ATTACKS = ("sign_flip", "scale", "gaussian")


@dataclass
class AttackOptions(Group):
    """Clients that send a manipulated update, for research on robust strategies."""

    group = "attack"

    name: str = choice("none", *ATTACKS)
    clients: int = option(
        0,
        "Number of attackers. They are the first clients in the order of their ids.",
        unit="clients",
        allowed=at_least(0),
    )
    strength: float = option(
        1.0,
        "sign_flip, scale: factor on the update. gaussian: norm of the noise, as a multiple of"
        " the update's norm.",
        allowed=above(0),
        only_with=ATTACKS,
    )

    def rules(self) -> Iterator[str]:
        """Attackers need an attack, and an attack needs attackers."""
        if self.name == "none" and self.clients:
            yield (
                f"attack.clients={self.clients}: attack=none has no attackers; choose"
                f" {' or '.join(f'attack={name}' for name in ATTACKS)}, or leave it out"
            )
        if self.name in ATTACKS and self.clients == 0:
            yield (
                f"attack.clients=0: attack={self.name} needs attackers; say how many, or take"
                " attack=none"
            )
