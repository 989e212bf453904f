"""Options of the group `privacy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from fedgpt.core.options.option import (
    Allowed,
    Group,
    between,
    facts_of,
    one_of,
    option,
)

PRIVATE = ("example", "client", "local")
MOST = 10**9  # largest number of releases or versions of a plan
MOST_BANDS = 10**4  # the server stores one noise vector for each band


@dataclass
class PrivacyOptions(Group):
    """Differential privacy: the unit that is protected, and the privacy budget."""

    group = "privacy"
    choice_field = "unit"
    reports_unused = True

    unit: str = option(
        "none",
        "Unit of privacy. example: one block of text (model.block_size + 1 tokens). client: all"
        " text of a client. local: all text of a client, also against the server. The choice of"
        " the group sets it.",
        allowed=one_of("none", *PRIVATE),
    )
    target_epsilon: float | None = option(
        None,
        "Privacy budget epsilon of the run; smaller is more private. It determines the noise, and"
        " the run stops before it exceeds the budget. null if privacy.noise_multiplier is set.",
        allowed=between(1e-6, 10**6),
        only_with=PRIVATE,
    )
    noise_multiplier: float | None = option(
        None,
        "Noise, instead of a budget: its standard deviation divided by privacy.clip (local: by"
        " twice privacy.clip). null means that the budget determines the noise.",
        allowed=between(1e-6, 10**6),
        only_with=PRIVATE,
    )
    delta: float | None = option(
        None,
        "Probability delta with which the bound epsilon may fail. null means n ** -1.1, where n is"
        " the number of protected units (blocks or clients).",
        allowed=Allowed("at least 1e-300 and below 1", lambda value: 1e-300 <= value < 1),
        only_with=PRIVATE,
    )
    clip: float = option(
        1.0,
        "Largest norm of a block's gradient (example) or of an update (client, local). A longer"
        " vector is scaled down to this norm before the noise is added.",
        allowed=between(1e-6, 10**6),
    )
    participations: int | None = option(
        None,
        "Largest number of participations of one client: releases with privacy=client, jobs"
        " otherwise. null means as many as the rounds need.",
        allowed=between(1, MOST),
    )
    engine: str = option(
        "bookkeeping",
        "Implementation of per-example gradients: bookkeeping (fedgpt's own, faster) or the"
        " library opacus.",
        allowed=one_of("bookkeeping", "opacus"),
        only_with=("example",),
    )
    adaptive: bool = option(
        False,
        "Whether privacy.clip follows the median of the update norms, which is estimated with"
        " differential privacy.",
        only_with=("client",),
    )
    bands: int = option(
        1,
        "Number of consecutive releases whose noise is correlated (matrix factorisation), so that"
        " later noise cancels a part of earlier noise.",
        unit="releases",
        allowed=Allowed(
            f"from 1 (independent noise) to {MOST_BANDS}", lambda value: 1 <= value <= MOST_BANDS
        ),
        only_with=("client",),
    )
    separation: int = option(
        1,
        "Smallest number of versions between two updates of the same client.",
        unit="versions",
        allowed=between(1, MOST),
        only_with=("client",),
    )
    single: bool = option(
        False,
        "Whether a release may contain the update of a single client. It needs as much noise as"
        " privacy=local.",
        only_with=("client",),
    )
    rng: str = option(
        "secure",
        "Source of the noise. secure: the operating system's generator. seeded: the run's seed,"
        " which makes the run deterministic and therefore NOT PRIVATE.",
        allowed=one_of("secure", "seeded"),
    )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Without a unit there is no noise. Values of older runs are accepted, so only an option
        that is typed is reported.
        """
        for one in fields(self) if self.unit == "none" else ():
            units = facts_of(one).only_with or PRIVATE
            if one.name != "unit" and getattr(self, one.name) is not None:
                yield one.name, f"privacy=none; choose privacy={one_of(*units).words}"

    def rules(self) -> Iterator[str]:
        """Report each value that has an effect only with another unit."""
        if self.unit not in ("none", *PRIVATE):
            return
        for one in fields(self):
            only_with, value = facts_of(one).only_with, getattr(self, one.name)
            if not only_with or self.unit in only_with or value == one.default:
                continue
            if self.unit == "none" and only_with == PRIVATE:
                yield (
                    f"privacy.{one.name}={value}: privacy=none protects nothing; choose example,"
                    " client or local"
                )
            elif self.unit != "none":
                yield (
                    f"privacy.{one.name}={value}: an option of privacy={only_with[0]}; leave it out"
                )
