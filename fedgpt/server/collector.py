"""The accepted updates of one version: decoded, validated, clipped, and summed as they arrive.

The updates of a linear rule are added to one exact sum and freed. A rule that overrides `combine`
gets all updates. With privacy=client a separate collector clips each update and adds noise to the
sum.
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
from fedgpt.update.compress import Codec, codec_of
from fedgpt.update.wire import Expected, decode

# norm of the weights up to which the sum of their squares is finite in float32; a run that learns
# stays far below it
LONGEST_MODEL = 1e18


@dataclass(frozen=True)
class Collecting:
    """The values that the collectors of all versions of a run share."""

    rule: Strategy
    run: str  # the run's id
    codec: Codec
    total: ExactSum  # its memory is reused by every version


class UpdateCollector:
    """The updates of one version; a rejected update does not change it."""

    def __init__(self, common: Collecting, limits: Limits):
        self.common, self.limits = common, limits
        self.weights: list[float] = []
        self.accepted: list[Update] = []  # accepted updates, without their vectors
        self.clipped = 0  # updates that were scaled down
        self._updates: list[Update] = []  # updates with vectors, for a rule that is not linear

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def full(self) -> bool:
        """Whether the exact sum cannot take another update."""
        return len(self) >= self.limits.max_updates

    @property
    def shown(self) -> Sequence[Update]:
        """Accepted updates whose clients may be named."""
        return self.accepted

    def read(self, reply: Reply, job: Job, tokens: int) -> Update:
        """Decode the update in a reply to `job`, a job of `tokens` tokens; raises
        UpdateRejected.
        """
        return decode(reply, self._expected(job, tokens, self.limits.norm))

    def add(self, update: Update, job: Job, staleness: int) -> Update:
        """Add an update, scaled down if it is too long; returns the update that was added.

        Raises UpdateRejected if an element does not fit the exact sum.
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
        """The next state; D is the exact weighted sum divided by its divisor, or the result of
        `combine`.

        `root` trains the server's own update, if the rule needs one.
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
        """The norms from which the norm limit of the next version is computed."""
        return remembered(norms, self.accepted)

    def _expected(self, job: Job, tokens: int, norm: float) -> Expected:
        run, codec, size = self.common.run, self.common.codec, job.params.size
        return Expected(run, job.client, job.number, job.version, size, tokens, norm, codec)

    def _weighed(self, update: Update, staleness: int) -> tuple[Update, float]:
        return update, self.common.rule.weight(update, staleness)

    def _published(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of one update that may be logged."""
        return metrics


class PrivateCollector(UpdateCollector):
    """privacy=client: every update is clipped, its weight is at most 1, and the sum gets noise."""

    def __init__(self, common: Collecting, limits: Limits, privacy: PaidByServer, clients: Clients):
        super().__init__(common, limits)
        self.privacy, self.clients = privacy, clients

    @property
    def shown(self) -> Sequence[Update]:
        """None: who was in a sample, which amplifies privacy, must not be published."""
        return ()

    def read(self, reply: Reply, job: Job, tokens: int) -> Update:
        """Decode an update of any norm; an update that is not finite counts as zeros.

        If it were rejected, other clients could replace it in later sums, which the privacy
        guarantee does not cover.
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
        """The next state, from the noisy sum; raises StoppedEarly if the budget is spent."""
        rule = self.common.rule
        divisor = self.privacy.divisor(rule, pacing)
        mean = self.common.total.mean(divisor)
        return rule.step(*self.privacy.release(mean, divisor, state, self.clients))

    def norms_after(self, norms: tuple[float, ...]) -> tuple[float, ...]:
        """No norms, because they belong to single clients and have no noise."""
        return ()

    def _weighed(self, update: Update, staleness: int) -> tuple[Update, float]:
        return self.privacy.take(update, self.common.rule, staleness)

    def _published(self, metrics: dict[str, float]) -> dict[str, float]:
        """Without the norm, because it belongs to one client and has no noise."""
        return {name: value for name, value in metrics.items() if name != "update_norm"}


class Collectors:
    """Opens the collector of each version of a run."""

    def __init__(self, options: RunOptions, rule: Strategy, privacy: Privacy, size: int, run: str):
        """`size`: parameters of the model; `run`: the run's id."""
        self.options, self.privacy, self.size = options, privacy, size
        total = ExactSum(size, bound=1.0, count=1)  # its memory is first used by the first update
        self.common = Collecting(
            rule, run, codec_of(options.update, options.trusted_packages), total
        )

    def open(
        self, state: ServerState, norms: tuple[float, ...], max_updates: int, clients: Clients
    ) -> UpdateCollector:
        """The collector for the version after `state`; it fixes the limits of this version.

        `norms`: norms of updates that were accepted before; `max_updates`: largest number of
        updates.
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
    """L2 norm of the weights, in float64; raises StoppedEarly if the run has diverged."""
    length = math.sqrt(float(np.einsum("i,i->", state.params, state.params, dtype=np.float64)))
    if not length <= LONGEST_MODEL:
        kind = f"weights of length {length:.3g}" if math.isfinite(length) else "NaN or Inf weights"
        raise StoppedEarly(
            f"version {state.version} has {kind}: it has diverged; lower local.lr, or strategy.eta"
            " if the strategy has it"
        )
    return length
