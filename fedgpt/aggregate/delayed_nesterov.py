"""Delayed Nesterov (Liu et al. 2024, arXiv 2401.09135, algorithm 3): momentum for pace=buffer.

Momentum that is updated on every arrival compounds and diverges. Here every arrival g moves the
model by g / N, but the momentum m is updated only once in N arrivals, from their mean B / N. On
arrival t = 0, 1, ...: B <- B + g, and

    if N divides t + 1:  m <- mu m + B / N ; theta <- theta - eta ((1 - c N + c) mu m + g / N) ;
                         B <- 0
    else:                theta <- theta - eta (c mu m + g / N)

with m0 = B0 = 0 and 0 <= c <= 1/N. With c = 0, N arrivals move the model like one step of Nesterov
on their mean; c > 0 spreads the momentum over the arrivals between two updates of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.refusals import ARRIVALS_NEED_BUFFER
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Pacing, ServerState, Update
from fedgpt.core.options.option import above, at_least, between, option, share


@dataclass(frozen=True)
class DelayedNesterov(Strategy):
    """Nesterov for pace=buffer with pace.goal=1; its memory is m, B and the number of arrivals.

    Good values for training from scratch are a period of 2 x pace.clients and mu 0.5 to 0.6.
    """

    paces = frozenset({"buffer"})
    refused_pacings = ARRIVALS_NEED_BUFFER

    eta: float = option(0.7, "Server learning rate: factor on the step.", allowed=above(0))
    mu: float = option(
        0.9,
        "Momentum. 0.5 to 0.6 is better when training from random weights; 0 is delta-SGD with"
        " eta / period.",
        allowed=share(),
    )
    period: int = option(
        8,
        "Number of arrivals from one move of the momentum to the next. Twice pace.clients is good.",
        unit="updates",
        allowed=at_least(1),
    )
    c: float = option(
        0.0,
        "Share of the momentum in each step between two of its moves, at most 1 / period.",
        allowed=between(0, 1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.c * self.period > 1:
            raise ConfigError(
                f"strategy.c={self.c}: must be from 0 to 1 / strategy.period, 1 / {self.period};"
                " lower it, or leave it out for the default, 0.0"
            )

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """Every arrival must be a server step, and a period must have room for every client."""
        if pacing.goal != 1:
            yield (
                f"pace.goal={pacing.goal}: strategy=delayed_nesterov counts single arrivals and"
                " allows pace.goal=1 only; set it, or take strategy=fedbuff"
            )
        if pacing.grace:
            yield (
                "pace.grace: strategy=delayed_nesterov counts single arrivals; leave it out, or"
                " take strategy=fedbuff"
            )
        if self.period < pacing.clients:
            yield (
                f"strategy.period={self.period} must be at least pace.clients, {pacing.clients}:"
                f" with less the momentum compounds; set strategy.period={2 * pacing.clients}"
                " (twice pace.clients is a good start)"
            )

    def weight(self, update: Update, staleness: int) -> float:
        """1, because `step` divides by N itself."""
        return 1.0

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """1, because D is the one update that arrived."""
        return 1.0

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """The state after one arrival."""
        m = state.memory.get("momentum", np.zeros_like(d))
        buffer = state.memory.get("buffer", np.zeros_like(d)) + d
        arrivals = int(state.memory.get("arrivals", 0)) + 1
        share = self.c
        if arrivals % self.period == 0:
            m = self.mu * m + buffer / self.period
            buffer = np.zeros_like(d)
            share = 1 - self.c * (self.period - 1)
        params = state.params - self.eta * (share * self.mu * m + d / self.period)
        return advance(state, params, momentum=m, buffer=buffer, arrivals=np.array(arrivals))
