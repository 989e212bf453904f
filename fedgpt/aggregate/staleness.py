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

from fedgpt.aggregate.base import NOT_NEGATIVE, POSITIVE, one_of


@dataclass(frozen=True)
class Discount:
    """The options of s(tau), for a rule to inherit."""

    staleness: str = "polynomial"  # constant, polynomial or hinge
    power: float = 0.5  # polynomial: exponent of the decrease of s
    slope: float = 10.0  # hinge: slope of the decrease of s after `grace`
    grace: float = 4.0  # hinge: number of versions without a discount

    def discount(self, staleness: int) -> float:
        """s(tau), in (0, 1]."""
        if self.staleness == "polynomial":
            return float((1 + staleness) ** -self.power)
        if self.staleness == "hinge" and staleness > self.grace:
            return float(1 / (self.slope * (staleness - self.grace) + 1))
        return 1.0


RANGES = {
    "staleness": one_of("constant", "polynomial", "hinge"),
    "power": POSITIVE,
    "slope": POSITIVE,
    "grace": NOT_NEGATIVE,
}
