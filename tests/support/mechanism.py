"""The real mechanism of privacy=client on a small vector, and broken versions of it.

It is small enough to be attacked hundreds of times. Each broken version is a context manager that
introduces one mistake which other implementations have made; the tests must find it.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.core.messages import Job, Pacing, Plan, ServerState, Update
from fedgpt.core.options import PaceOptions, PrivacyOptions, RunOptions
from fedgpt.privacy.accounting import Event
from fedgpt.privacy.plan import PrivacyPlan
from fedgpt.server.collector import Collectors
from fedgpt.server.privacy import PaidByServer
from fedgpt.storage.tables import Clients

SIZE, CLIP, COHORT = 4000, 0.5, 10
QUIET = 1e-9  # a noise multiplier so small that its noise is negligible


def options(**privacy: Any) -> RunOptions:
    chosen = PrivacyOptions(**{"unit": "client", "noise_multiplier": 1.0, "clip": CLIP, **privacy})
    return RunOptions(privacy=chosen, pace=PaceOptions(clients=0, rate=0.1))


def plan(
    noise: float, sampling: str = "poisson", participations: int = 100, scale: float = 1.0
) -> PrivacyPlan:
    event = Event(noise, 0.1 if sampling == "poisson" else 1.0, 100)
    return PrivacyPlan(
        "client", sampling, event, 1e-5, None, 100, participations, float(COHORT), scale
    )


class Mechanism:
    """A server under privacy=client that makes one release after the other."""

    def __init__(
        self,
        folder: Path,
        noise: float,
        size: int = SIZE,
        strategy: Strategy | None = None,
        **privacy: Any,
    ):
        o = options(**privacy)
        sampling = "correlated" if o.privacy.bands > 1 else "poisson"
        self.privacy = PaidByServer(o, plan(noise, sampling), folder, "data", fresh=True)
        self.collectors = Collectors(o, strategy or FedAvg(), self.privacy, size, "run")
        self.state = ServerState(np.zeros(size, np.float32))
        self.clients = Clients()
        self.open(most=1)

    def open(self, most: int) -> None:
        self.collector = self.collectors.open(self.state, (), most, self.clients)

    def release(self, updates: list[tuple[np.ndarray, int]]) -> np.ndarray:
        """D of one version from (delta, tokens) of each client."""
        self.open(len(updates) + 1)
        for number, (delta, tokens) in enumerate(updates):
            norm = float(np.linalg.norm(delta.astype(np.float64)))
            update = Update(
                f"client {number}", 0, self.state.version, delta, tokens, {"update_norm": norm}
            )
            self.collector.add(update, Job(update.client, 0, 0, delta, Plan("test", 1, 0, 1, 1)), 0)
        before = self.state
        self.state = self.collector.step(before, Pacing("cohort", COHORT, COHORT))
        return before.params - self.state.params


def patched(name: str, new: Any) -> Any:
    return mock.patch(name, new)


# Broken versions.


@contextmanager
def no_noise():
    with patched("fedgpt.privacy.randomness.SecureStream.add_normal", lambda self, out, std: None):
        yield


@contextmanager
def noise_times(factor: float):
    from fedgpt.privacy.randomness import SecureStream

    correct = SecureStream.add_normal
    with patched(
        "fedgpt.privacy.randomness.SecureStream.add_normal",
        lambda self, out, std: correct(self, out, std * factor),
    ):
        yield


@contextmanager
def divided_by_participants():
    with patched(
        "fedgpt.server.privacy.PaidByServer.divisor",
        lambda self, rule, pacing: float(len(self.shares)),
    ):
        yield


@contextmanager
def noise_divided_twice():
    with noise_times(1 / COHORT):
        yield


@contextmanager
def not_clipped():
    with patched("fedgpt.server.privacy.clipped", lambda delta, clip: delta), wide_sum():
        yield


@contextmanager
def clipped_after_averaging():
    from fedgpt.privacy.clipping import clipped

    correct = PaidByServer.release

    def release(self, mean, divisor, state, clients):
        return correct(self, clipped(mean, self.clip), divisor, state, clients)

    with not_clipped(), patched("fedgpt.server.privacy.PaidByServer.release", release):
        yield


@contextmanager
def clipped_by_layer(layers: int = 16):
    from fedgpt.privacy.clipping import clipped

    def each(delta, clip):
        return np.concatenate([clipped(part, clip) for part in np.array_split(delta, layers)])

    with patched("fedgpt.server.privacy.clipped", each), wide_sum():
        yield


@contextmanager
def clipped_to(factor: float):
    from fedgpt.privacy.clipping import clipped

    with (
        patched("fedgpt.server.privacy.clipped", lambda delta, clip: clipped(delta, factor * clip)),
        wide_sum(),
    ):
        yield


@contextmanager
def weighted_by_tokens(most: float = 1000.0):
    correct = PaidByServer.take

    def take(self, update, rule, staleness):
        clipped_update, _ = correct(self, update, rule, staleness)
        return clipped_update, min(most, float(update.tokens))

    with patched("fedgpt.server.privacy.PaidByServer.take", take), wide_sum(max_weight=most):
        yield


@contextmanager
def reused_noise():
    from fedgpt.privacy.randomness import SecureStream

    with patched(
        "fedgpt.server.privacy.SecureStream", lambda key, *words: SecureStream(bytes(32), "always")
    ):
        yield


@contextmanager
def wrong_sign():
    from fedgpt.privacy.clipping import AdaptiveClip

    correct = AdaptiveClip.next

    def wrong(self, clip, bits, cohort, noise):
        return clip**2 / correct(self, clip, bits, cohort, noise)

    with patched("fedgpt.privacy.clipping.AdaptiveClip.next", wrong):
        yield


@contextmanager
def noiseless_bits():
    from fedgpt.privacy.clipping import AdaptiveClip

    correct = AdaptiveClip.next

    def quiet(self, clip, bits, cohort, noise):
        return correct(self, clip, bits, cohort, 0.0)

    with patched("fedgpt.privacy.clipping.AdaptiveClip.next", quiet):
        yield


@contextmanager
def unpaid_bits():
    with patched("fedgpt.privacy.clipping.AdaptiveClip.release_noise", lambda self, z, cohort: z):
        yield


@contextmanager
def wide_sum(max_weight: float = 1.0):
    """A sum with wide limits; otherwise it refuses the long updates of a broken version."""
    from fedgpt.aggregate.exact import ExactSum

    correct = ExactSum.reset

    def reset(self, bound=None, count=None, _=None):
        correct(self, 1e6 if bound is None else 1e6 * bound, count, max_weight)

    with patched("fedgpt.aggregate.exact.ExactSum.reset", reset):
        yield
