"""The staleness discount s(tau): a factor on the weight of an update of staleness tau.

Under pace=buffer a client may train on a model that the server has since replaced. Its update is
still useful, but less useful the older its model is. The rules for pace=buffer share three
discounts:

    constant    1
    polynomial  (1 + tau)^-power
    hinge       1 up to tau = grace, then 1 / (slope (tau - grace) + 1)

They come from FedAsync (Xie et al. 2019, arXiv 1903.03934, where power and slope are called `a` and
grace `b`). tau is counted before the server step, so an update to the current version has s(0) = 1.
s never increases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedgpt.core.options.option import above, at_least, one_of, option


def falling(default: str) -> Any:
    """The field `staleness` of a rule, whose default differs from rule to rule."""
    return option(
        default,
        "How the weight of an update falls with its staleness tau, the number of versions since its"
        " client received the model.",
        allowed=one_of("constant", "polynomial", "hinge"),
    )


@dataclass(frozen=True)
class Discount:
    """The options of s(tau), for a rule to inherit."""

    staleness: str = falling("polynomial")
    power: float = option(0.5, "polynomial: the weight is (1 + tau) ** -power.", allowed=above(0))
    slope: float = option(
        10.0,
        "hinge: above grace the weight is 1 / (slope * (tau - grace) + 1).",
        allowed=above(0),
    )
    grace: float = option(
        4.0,
        "hinge: staleness up to which an update has its full weight.",
        unit="versions",
        allowed=at_least(0),
    )

    def discount(self, staleness: int) -> float:
        """s(tau), in (0, 1]."""
        if self.staleness == "polynomial":
            return float((1 + staleness) ** -self.power)
        if self.staleness == "hinge" and staleness > self.grace:
            return float(1 / (self.slope * (staleness - self.grace) + 1))
        return 1.0
