"""The interface of a strategy: the rule that computes the next global model from clients' updates.

A client trains the global model for one job and returns its update, delta = start - end. The server
gives every update a weight, adds the weighted updates, divides the sum and takes a step:

    update -> weight -> exact sum -> / divisor = D -> step -> next ServerState

A strategy is a frozen dataclass that overrides `weight`, `divisor` and `step` where it differs from
federated averaging. Robust rules (median, Krum, ...) need all updates at once, so they override
`combine`, which replaces weight, sum and divisor. The pacing decides when the server takes a step:
after a round, or after K arrivals. It is not part of a strategy, but `paces` names the pacings that
a strategy supports. A rule that changes the clients' training by more than `client_numbers`, or
that sends a second vector beside the update (SCAFFOLD), cannot be a strategy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Choice, Observed, Pacing, ServerState, Update
from fedgpt.core.options.option import field_problems


@dataclass(frozen=True)
class Strategy:
    """Federated averaging, and the interface of every other rule.

    params <- params - D with D = sum(weight * delta) / divisor. D is a pseudo-gradient (start -
    end), so every rule subtracts it. Methods are pure: they return new values and do not change
    their arguments. A rule stores arrays for its next step only in `state.memory`, which every
    checkpoint contains.

    The fields are options (`strategy.eta`), written with `option`: their types, and the values that
    they allow, are checked when the object is made.

    A rule that weights clients by the square root of their tokens, halves the step, and remembers
    the last D:

    >>> from fedgpt.core.options.option import above, option
    >>> @dataclass(frozen=True)
    ... class RootWeighted(Strategy):
    ...     eta: float = option(0.5, "Server learning rate.", allowed=above(0))
    ...
    ...     def weight(self, update, staleness):
    ...         return update.tokens**0.5
    ...
    ...     def step(self, d, state):
    ...         return advance(state, state.params - self.eta * d, last=d)

    One round of it, done by hand as the server does it (which adds up with `ExactSum`):

    >>> rule, state = RootWeighted(), ServerState(np.float32([1, 1]))
    >>> updates = [
    ...     Update("ann", 0, 0, delta=np.float32([0.4, 0.0]), tokens=100),
    ...     Update("bob", 0, 0, delta=np.float32([0.0, 0.8]), tokens=900),
    ... ]
    >>> weights = [rule.weight(update, staleness=0) for update in updates]
    >>> weights
    [10.0, 30.0]
    >>> total = sum(weight * update.delta for weight, update in zip(weights, updates))
    >>> total
    array([ 4., 24.], dtype=float32)
    >>> d = total / rule.divisor(weights, Pacing("cohort", clients=2, goal=2))
    >>> d
    array([0.1, 0.6], dtype=float32)
    >>> state = rule.step(d, state)
    >>> state.params, state.version, state.memory
    (array([0.95, 0.7 ], dtype=float32), 1, {'last': array([0.1, 0.6], dtype=float32)})
    """

    # One server step.

    def weight(self, update: Update, staleness: int) -> float:
        """Weight of one update, above 0: by default its tokens times `discount(staleness)`.

        `staleness` counts the server versions since the client's download; the weight must be
        largest at staleness 0. A rule for which staleness counts overrides `discount`, which is all
        that privacy=client weights by, and takes the factor from there where it overrides `weight`.
        """
        return update.tokens * self.discount(staleness)

    def divisor(self, weights: Sequence[float], pacing: Pacing) -> float:
        """Divisor of the weighted sum: by default the sum of the weights.

        `math.fsum` rounds once, so the result does not depend on the order of arrival.
        """
        return math.fsum(weights)

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """The next state; d has the shape and dtype of `state.params`."""
        return advance(state, state.params - d)

    def client_numbers(self) -> dict[str, float]:
        """Numbers that change the clients' training, by name, such as `proximal_mu`.

        They are sent with every job. Code is never sent: a client looks the names up in
        CLIENT_NUMBERS of local/trainer.py, so far only `proximal_mu`, and refuses a job with
        another name.
        """
        return {}

    # The supported pacings.

    paces: ClassVar[frozenset[str]] = frozenset({"cohort"})  # names of the allowed pacings
    # name of a pacing that is not allowed -> the reason, and what to choose instead
    refused_pacings: ClassVar[Mapping[str, str]] = {}

    def problems(self, pacing: Pacing) -> Iterator[str]:
        """Yield a message for every option that is wrong under this pacing, before a run starts."""
        yield from ()

    # Rules that are not a weighted sum.

    @property
    def needed(self) -> int:
        """Smallest number of updates from which `combine` can compute a step."""
        return 1

    needs_base: ClassVar[bool] = False  # whether `combine` reads Update.base
    # whether `combine` needs an update that the server trained itself, on public text
    needs_root: ClassVar[bool] = False

    @property
    def linear(self) -> bool:
        """Whether D is a weighted sum (`combine` is not overridden), so that no update has to be
        kept.
        """
        return type(self).combine is Strategy.combine

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """D from all updates of a step, in place of weight, sum and divisor.

        The updates are in the order of stable client ids under pace=cohort and in the order of
        arrival under pace=buffer. `root` is the server's own update if `needs_root`.
        """
        raise NotImplementedError(f"{self.name} is linear: its updates are summed, not combined")

    def remember(self, updates: Sequence[Update], state: ServerState) -> dict[str, np.ndarray]:
        """Arrays that a rule with `combine` adds to `state.memory` before `step`, such as recent
        norms.
        """
        return {}

    # Rarely needed.

    @property
    def name(self) -> str:
        """The rule in messages and reports: a built-in rule's module, else the class in lower case.

        A built-in rule is selected by this name, as in `strategy=fedavg`.
        """
        package, _, module = type(self).__module__.rpartition(".")
        return module if package == __package__ else type(self).__name__.lower()

    def discount(self, staleness: int) -> float:
        """The factor of `weight` that depends on staleness, in (0, 1]; see staleness.py.

        Under privacy=client the server weights updates by this factor alone, because the weight
        must not depend on a client's number of tokens.
        """
        return 1.0

    switches: ClassVar[bool] = False  # whether `choose_pacing` may change the pacing of a run

    def choose_pacing(self, observed: Observed, state: ServerState) -> Choice:
        """The pacing to continue with, asked at every version and, in a round, at every arrival."""
        return Choice(observed.pacing)

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Names of state outside `state.memory`; if there is any, a run cannot be resumed."""
        return ()

    def __post_init__(self) -> None:
        """Raise ConfigError with a message for each field whose type or value is not allowed.

        A rule that also checks combinations of fields calls `super().__post_init__()` first.
        """
        if problems := list(field_problems(type(self), vars(self), "strategy")):
            raise ConfigError(problems)


def advance(state: ServerState, params: np.ndarray, **memory: np.ndarray) -> ServerState:
    """The next version of `state`, with these parameters and with `memory` added to its memory.

    The parameters keep their dtype, and floating-point arrays of their shape are converted to it.
    Otherwise an np.float64 factor would double the size of the model, the checkpoint and messages.
    """
    dtype, shape = state.params.dtype, state.params.shape
    if params.shape != shape:
        raise ValueError(
            f"a step changed the shape of the parameters from {shape} to {params.shape}"
        )

    def cast(array: np.ndarray) -> np.ndarray:
        model_sized = array.shape == shape and array.dtype.kind == "f"
        return array.astype(dtype, copy=False) if model_sized else array

    added = {name: cast(array) for name, array in memory.items()}
    return ServerState(
        params.astype(dtype, copy=False), state.version + 1, {**state.memory, **added}
    )
