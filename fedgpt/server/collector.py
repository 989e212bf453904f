"""What comes in for the next version: replies decoded, validated, clipped, and summed as they
arrive or held.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.core.errors import StoppedEarly, UpdateRejected
from fedgpt.core.messages import Job, Pacing, Reply, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.server.limits import clip_length, norm_limit
from fedgpt.server.privacy import PaidByServer, Privacy
from fedgpt.storage.checkpoint import RunTables
from fedgpt.update.codec import Expected, decode
from fedgpt.update.compress import codec_of

# of a model's weights: their squares still add up in float32, and none that learns is near
LONGEST = 1e18


class UpdateCollector:
    """The accepted updates of one version; a rejected one leaves nothing but its counter."""

    def __init__(self, options: RunOptions, strategy: Strategy, size: int, privacy: Privacy):
        self.options, self.strategy = options, strategy
        self.private = privacy if isinstance(privacy, PaidByServer) else None
        self.codec = codec_of(options.update, options.trusted_packages)
        self.noise_length = privacy.longest(size)
        self._sum = ExactSum(size, bound=1.0, count=1)  # untouched memory, if no rule adds to it

    def __len__(self) -> int:
        return len(self.weights)

    def begin(
        self, state: ServerState, norms: tuple[float, ...], max_updates: int, job_tokens: int
    ) -> None:
        """Forget the last version's updates and freeze what the next ones, at most `most`, are
        measured against.
        """
        self.weights: list[float] = []
        self.accepted: list[Update] = []  # without their vectors
        self.rejections: Counter[str] = Counter()
        self.clipped = 0
        self._updates: list[Update] = []  # only rules that are not linear keep them
        self.max_updates = max_updates
        limit = norm_limit(self.options.validate, norms, model_length(state))
        self.norm_limit = max(limit, self.noise_length)
        self._clip = clip_length(self.options.validate, norms)
        if self.private is not None:
            self.private.begin(state)
            self._sum.reset(self.private.clip, max_updates)
        elif self.strategy.linear:
            whole = Update("", 0, state.version, state.params, job_tokens)
            # no update can weigh more
            self._sum.reset(self.norm_limit, max_updates, self.strategy.weight(whole, 0))

    def read(self, reply: Reply, job: Job, run: str, tokens: int) -> Update:
        """The update in a reply to `job`, which was of `tokens` tokens; raises UpdateRejected."""
        size = job.params.size
        limit = self.norm_limit if self.private is None else math.inf
        expected = Expected(
            run, reply.client, reply.number, job.version, size, tokens, limit, self.codec
        )
        try:
            return decode(reply, expected)
        except UpdateRejected as rejection:
            if self.private is None or rejection.code != "non_finite":
                raise
            # refused, it would move other clients' places in sums; as zeros it is one that the
            # promise speaks of
            zeros = np.zeros(size, np.float32)
            return Update(job.client, job.number, job.version, zeros, tokens, {"update_norm": 0.0})

    def add(self, update: Update, job: Job, staleness: int) -> Update:
        """Count an update, clipped where it is long; returns it as counted, raises
        UpdateRejected.
        """
        norm = update.metrics["update_norm"]
        clipped = self._clip is not None and norm > self._clip
        if self._clip is not None and clipped:
            update = replace(update, delta=update.delta * np.float32(self._clip / norm))
        if self.private is not None:
            update, weight = self.private.take(update, self.strategy, staleness)
        else:
            weight = self.strategy.weight(update, staleness)
        if self.strategy.linear:
            try:
                self._sum.add(update.delta, weight, norm)
            except (
                OverflowError
            ) as error:  # one element above the norm's limit, which float32's norm let pass
                raise UpdateRejected("norm_limit", str(error)) from error
        else:
            self._updates.append(
                replace(update, base=job.params) if self.strategy.needs_base else update
            )
        self.clipped += clipped
        self.weights.append(weight)
        metrics = {**update.metrics, "staleness": staleness}
        if self.private is not None:
            del metrics["update_norm"]  # of one client, and not noised
        self.accepted.append(replace(update, delta=np.empty(0, np.float32), metrics=metrics))
        return update

    def step(
        self,
        state: ServerState,
        pacing: Pacing,
        root: Callable[[], Update] | None,
        tables: RunTables,
    ) -> ServerState:
        """The next state: D is the exact weighted sum over its divisor, or what a combining rule
        makes of it.

        With privacy=client the sum gets its noise first, which `ledgers` note; raises StoppedEarly
        over the budget.
        """
        rule = self.strategy
        if self.private is not None:
            divisor = self.private.divisor(rule, pacing)
            return rule.step(*self.private.release(self._sum.mean(divisor), divisor, state, tables))
        if rule.linear:
            divisor = rule.divisor(self.weights, pacing) if self.weights else 1.0
            return rule.step(self._sum.mean(divisor), state)
        updates = self._updates
        if pacing.name == "cohort":
            updates = sorted(updates, key=lambda update: (update.client, update.number))
        d = rule.combine(updates, state, None if root is None else root())
        learned = rule.remember(updates, state)
        return rule.step(
            d, replace(state, memory={**state.memory, **learned}) if learned else state
        )


def model_length(state: ServerState) -> float:
    """L2 norm of the weights, in float64; raises StoppedEarly where they have run away."""
    length = math.sqrt(float(np.einsum("i,i->", state.params, state.params, dtype=np.float64)))
    if not length <= LONGEST:
        weights = (
            f"weights of length {length:.3g}" if math.isfinite(length) else "NaN or Inf weights"
        )
        raise StoppedEarly(
            f"version {state.version} has {weights}: it has diverged; lower strategy.eta or"
            " local.lr"
        )
    return length
