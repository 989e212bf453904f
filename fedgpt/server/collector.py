"""The accepted updates of one version: decoded, validated, clipped, and summed as they arrive.

A linear rule's updates are added to one exact sum and forgotten; a rule that overrides `combine`
gets them all. With privacy=client the sum is clipped and noised before anything is made of it:
that is a collector of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.core.errors import StoppedEarly, UpdateRejected
from fedgpt.core.messages import Job, Pacing, Reply, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.server.limits import Limits, clip_length, norm_limit, remembered
from fedgpt.server.privacy import PaidByServer, Privacy
from fedgpt.storage.tables import Clients
from fedgpt.update.codec import Expected, decode
from fedgpt.update.compress import Codec, codec_of

# length of a model's weights up to which their squares can be added in float32; no run that learns
# comes near it
LONGEST_MODEL = 1e18


@dataclass(frozen=True)
class Collecting:
    """What is the same for the collectors of all versions of a run."""

    rule: Strategy
    run: str  # the run's id
    codec: Codec
    total: ExactSum  # its memory is used again by every version


class UpdateCollector:
    """One version's updates; a rejected update leaves nothing here."""

    def __init__(self, common: Collecting, limits: Limits):
        self.common, self.limits = common, limits
        self.weights: list[float] = []
        self.accepted: list[Update] = []  # without their vectors
        self.clipped = 0  # updates that were scaled down
        self._updates: list[Update] = []  # with vectors, for a rule that is not linear

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def full(self) -> bool:
        """Whether the exact sum has room for no further update."""
        return len(self) >= self.limits.max_updates

    @property
    def shown(self) -> Sequence[Update]:
        """Accepted updates whose clients may be named."""
        return self.accepted

    def read(self, reply: Reply, job: Job, tokens: int) -> Update:
        """The update in a reply to `job`, which was of `tokens` tokens; raises UpdateRejected."""
        return decode(reply, self._expected(job, tokens, self.limits.norm))

    def add(self, update: Update, job: Job, staleness: int) -> Update:
        """Count an update, scaled down where it is too long; returns it as it was counted.

        Raises UpdateRejected where an element does not fit the exact sum.
        """
        norm = update.metrics["update_norm"]
        clip = self.limits.clip
        if clip is not None and norm > clip:
            update = replace(update, delta=update.delta * np.float32(clip / norm))
            self.clipped += 1
        update, weight = self._weighed(update, staleness)
        rule = self.common.rule
        if rule.linear:
            try:
                self.common.total.add(update.delta, weight, norm)
            except OverflowError as error:  # one element above a limit that its norm is below
                raise UpdateRejected("norm_limit", str(error)) from error
        else:
            self._updates.append(replace(update, base=job.params) if rule.needs_base else update)
        self.weights.append(weight)
        metrics = self._published({**update.metrics, "staleness": staleness})
        self.accepted.append(replace(update, delta=np.empty(0, np.float32), metrics=metrics))
        return update

    def step(
        self, state: ServerState, pacing: Pacing, root: Callable[[], Update] | None = None
    ) -> ServerState:
        """The next state: D is the exact weighted sum over its divisor, or what the rule combines.

        `root` trains the server's own update, where the rule asks for one.
        """
        rule, total = self.common.rule, self.common.total
        if rule.linear:
            divisor = rule.divisor(self.weights, pacing) if self.weights else 1.0
            return rule.step(total.mean(divisor), state)
        updates = self._updates
        if pacing.name == "cohort":
            updates = sorted(updates, key=lambda update: (update.client, update.number))
        d = rule.combine(updates, state, None if root is None else root())
        learned = rule.remember(updates, state)
        return rule.step(
            d, replace(state, memory={**state.memory, **learned}) if learned else state
        )

    def norms_after(self, norms: tuple[float, ...]) -> tuple[float, ...]:
        """The norms that the next version's updates are measured by."""
        return remembered(norms, self.accepted)

    def _expected(self, job: Job, tokens: int, norm: float) -> Expected:
        run, codec, size = self.common.run, self.common.codec, job.params.size
        return Expected(run, job.client, job.number, job.version, size, tokens, norm, codec)

    def _weighed(self, update: Update, staleness: int) -> tuple[Update, float]:
        return update, self.common.rule.weight(update, staleness)

    def _published(self, metrics: dict[str, float]) -> dict[str, float]:
        """What may be logged of one update."""
        return metrics


class PrivateCollector(UpdateCollector):
    """privacy=client: every update is clipped and weighs at most 1; the sum is released noised."""

    def __init__(self, common: Collecting, limits: Limits, privacy: PaidByServer, clients: Clients):
        super().__init__(common, limits)
        self.privacy, self.clients = privacy, clients

    @property
    def shown(self) -> Sequence[Update]:
        """None: who was in a sample, which amplifies privacy, must not be published."""
        return ()

    def read(self, reply: Reply, job: Job, tokens: int) -> Update:
        """As for any update, of any length; one that is not finite counts as zeros.

        If it were rejected, other clients could take its place in later sums, and the promise
        would not cover that.
        """
        try:
            return decode(reply, self._expected(job, tokens, math.inf))
        except UpdateRejected as rejection:
            if rejection.code != "non_finite":
                raise
            zeros = np.zeros(job.params.size, np.float32)
            norm = {"update_norm": 0.0}
            return Update(job.client, job.number, job.version, zeros, tokens, norm)

    def step(
        self, state: ServerState, pacing: Pacing, root: Callable[[], Update] | None = None
    ) -> ServerState:
        """The next state, from the noised sum; raises StoppedEarly where the budget is spent."""
        rule = self.common.rule
        divisor = self.privacy.divisor(rule, pacing)
        mean = self.common.total.mean(divisor)
        return rule.step(*self.privacy.release(mean, divisor, state, self.clients))

    def norms_after(self, norms: tuple[float, ...]) -> tuple[float, ...]:
        """None: they are single clients' and not noised."""
        return ()

    def _weighed(self, update: Update, staleness: int) -> tuple[Update, float]:
        return self.privacy.take(update, self.common.rule, staleness)

    def _published(self, metrics: dict[str, float]) -> dict[str, float]:
        """Not the norm, which is one client's and not noised."""
        return {name: value for name, value in metrics.items() if name != "update_norm"}


class Collectors:
    """Opens the collector of each version of a run."""

    def __init__(self, options: RunOptions, rule: Strategy, privacy: Privacy, size: int, run: str):
        """`size`: parameters of the model; `run`: the run's id."""
        self.options, self.privacy, self.size = options, privacy, size
        total = ExactSum(size, bound=1.0, count=1)  # memory that is touched with the first update
        self.common = Collecting(
            rule, run, codec_of(options.update, options.trusted_packages), total
        )

    def open(
        self, state: ServerState, norms: tuple[float, ...], max_updates: int, clients: Clients
    ) -> UpdateCollector:
        """The collector for the version after `state`, whose limits are fixed from now on.

        `norms`: of updates that were accepted before; `max_updates`: how many can come.
        """
        validate, total = self.options.validate, self.common.total
        limit = norm_limit(validate, norms, model_length(state))
        limit = max(limit, self.privacy.noise_length(self.size))
        limits = Limits(limit, clip_length(validate, norms), max_updates)
        if isinstance(self.privacy, PaidByServer):
            self.privacy.begin(state)
            total.reset(self.privacy.clip, max_updates)
            return PrivateCollector(self.common, limits, self.privacy, clients)
        if self.common.rule.linear:
            heaviest = Update("", 0, state.version, state.params, self._job_tokens)
            total.reset(limits.norm, max_updates, self.common.rule.weight(heaviest, 0))
        return UpdateCollector(self.common, limits)

    @property
    def _job_tokens(self) -> int:
        local = self.options.local
        return local.steps * local.accumulate * local.batch_size * self.options.model.block_size


def model_length(state: ServerState) -> float:
    """L2 norm of the weights, in float64; raises StoppedEarly where the run has diverged."""
    length = math.sqrt(float(np.einsum("i,i->", state.params, state.params, dtype=np.float64)))
    if not length <= LONGEST_MODEL:
        kind = f"weights of length {length:.3g}" if math.isfinite(length) else "NaN or Inf weights"
        raise StoppedEarly(
            f"version {state.version} has {kind}: it has diverged; lower strategy.eta or local.lr"
        )
    return length
