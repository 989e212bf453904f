"""What a server rule is: from clients' updates to the next global model.

A strategy is a frozen dataclass that overrides what differs from federated averaging. Its place in
the flow: validated updates -> weight -> exact sum (or `combine`) -> / divisor -> `step` -> next
`ServerState`. When a step happens is not its business (pacing, server/); `paces` names the pacings
it is right for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Choice, Observed, Pacing, ServerState, Update


@dataclass(frozen=True)
class Strategy:
    """Federated averaging's frame: `params <- params - D`, D = sum(weight * delta) / divisor.

    D is a pseudo-gradient (start - end), so every rule subtracts it. Methods are pure: values in,
    new values out, inputs left alone; what a rule remembers is in `state.memory` and nowhere else.
    """

    # the pacings it is right for; others are refused
    paces: ClassVar[frozenset[str]] = frozenset({"cohort"})
    because: ClassVar[
        Mapping[str, str]
    ] = {}  # pacing -> why it is refused and what to take instead
    needs_base: ClassVar[bool] = False  # whether `combine` reads Update.base
    # whether `combine` wants an update that the server trained on public text
    needs_root: ClassVar[bool] = False

    switches: ClassVar[bool] = False  # whether `choose_pacing` may change the pacing of a run

    @property
    def name(self) -> str:
        """How messages and reports call it; a built-in one is selected by this name, its
        module's.
        """
        package, _, module = type(self).__module__.rpartition(".")
        return module if package == __package__ else type(self).__name__.lower()

    @property
    def linear(self) -> bool:
        """Whether D is a fixed weighted sum, so that updates need not be held: True where combine
        is not overridden.
        """
        return type(self).combine is Strategy.combine

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Names of what it remembers outside `state.memory`: a run with any cannot be resumed."""
        return ()

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """What is wrong with this rule under that pacing, each named as typed with what to
        change.
        """
        yield from ()

    def choose_pacing(self, observed: Observed, state: ServerState) -> Choice:
        """The pacing to go on with, asked at every version and, within a cohort, at every
        arrival.
        """
        return Choice(observed.pacing)

    def weight(self, update: Update, staleness: int) -> float:
        """Weight of one update, above 0, largest at staleness 0; staleness counts server versions
        since download.
        """
        return float(update.tokens)

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """What the weighted sum is divided by; exactly rounded, so the order of arrival does not
        matter.
        """
        return math.fsum(weights)

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """D of a rule that is not a weighted sum (median, Krum, ...).

        Updates come in the order of stable client ids (pace=cohort) or of arrival (pace=buffer);
        `root` is the server's own, where `needs_root`.
        """
        raise NotImplementedError(f"{self.name} is linear: its updates are summed, not combined")

    def remember(self, updates: Sequence[Update], state: ServerState) -> dict[str, np.ndarray]:
        """What a combining rule adds to memory beside D, from the same updates; `step` then finds
        it there.
        """
        return {}

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """The next state; d has the shape and dtype of `state.params`."""
        return advance(state, state.params - d)

    def client_numbers(self) -> dict[str, float]:
        """The client half, by name and value (never as code); the client looks names up in its own
        registry.
        """
        return {}


def advance(state: ServerState, params: np.ndarray, **memory: np.ndarray) -> ServerState:
    """The state one version on, with `memory` added to what is remembered; params keep their dtype.

    Floats shaped like params get params' dtype too: a stray np.float64 factor would otherwise
    double the model, the checkpoint and the traffic.
    """
    dtype, shape = state.params.dtype, state.params.shape
    if params.shape != shape:
        raise ValueError(
            f"a step changed the shape of the parameters from {shape} to {params.shape}"
        )
    cast = {
        name: (
            array.astype(dtype, copy=False)
            if array.shape == shape and array.dtype.kind == "f"
            else array
        )
        for name, array in memory.items()
    }
    return ServerState(
        params.astype(dtype, copy=False), state.version + 1, {**state.memory, **cast}
    )


class Range(NamedTuple):
    """Values an option may take, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str
    kind: type = Real


POSITIVE = Range(lambda value: value > 0, "a number above 0")
NOT_NEGATIVE = Range(lambda value: value >= 0, "a number of at least 0")
FRACTION = Range(lambda value: 0 <= value < 1, "a number in [0, 1)")
WHOLE = Range(lambda value: value >= 0, "a whole number of at least 0", Integral)
COUNT = Range(lambda value: value >= 1, "a whole number of at least 1", Integral)


def one_of(*words: str) -> Range:
    """The values of an option that is a word."""
    return Range(lambda value: value in words, f"one of {', '.join(words)}", str)


def check(strategy: Strategy, **ranges: Range) -> None:
    """For `__post_init__`: raise ConfigError that lists every field outside its range, named as
    typed.
    """
    defaults = {field.name: field.default for field in fields(strategy)}
    problems = []
    for field, allowed in ranges.items():
        value = getattr(strategy, field)
        right = isinstance(value, allowed.kind) and not isinstance(value, bool)
        if (
            not right
            or (allowed.kind is not str and not math.isfinite(value))
            or not allowed.holds(value)
        ):
            default = (
                ""
                if defaults[field] is MISSING
                else f", or leave it out for the default, {defaults[field]}"
            )
            problems.append(f"strategy.{field}={value} must be {allowed.words}: change it{default}")
    if problems:
        raise ConfigError(problems)
