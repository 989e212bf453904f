"""The client's own side of privacy: its key, its ledger, and what it checks before it lets anything
out.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fedgpt.core.messages import Job
from fedgpt.core.options import RunOptions
from fedgpt.data.batches import Blocks
from fedgpt.local.private import PrivateSteps
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.clipping import clipped
from fedgpt.privacy.ledger import BudgetExhausted, Ledger
from fedgpt.privacy.plan import sampling_probability
from fedgpt.privacy.randomness import SecureStream, derive, secret_key
from fedgpt.update.codec import digest


class ClientPrivacy:
    """What one client adds to one job, paid for in its own ledger first; nothing here trusts the
    server.
    """

    def __init__(
        self, options: RunOptions, folder: Path, tokens: np.ndarray, environment: dict[str, Any]
    ):
        """`folder` is the client's own; `environment` is what the bits of its result depend on
        beside the job.
        """
        self.options = options
        self.folder = folder
        self.tokens = tokens
        self.environment = environment
        # releases paid for since the client's first job, those of the present one included
        self.charged = 0.0

    def steps(self, job: Job, state: str) -> PrivateSteps:
        """privacy=example: what makes the steps of `job` private; `state` names the moments that it
        starts from.
        """
        o = self.options
        blocks = Blocks(self.tokens, o.model.block_size)
        probability = sampling_probability(o, len(blocks))
        event = Event(job.plan.noise_multiplier, probability, job.plan.local_steps)
        stream = self._paid(job, state, event, o.local.steps, len(blocks))
        return PrivateSteps(blocks, stream, probability, job.plan.noise_multiplier, o.privacy.clip)

    def hidden(self, job: Job, delta: np.ndarray, state: str) -> np.ndarray:
        """privacy=local: the update, clipped and noised: one update may become any other, which
        moves it by 2 C.
        """
        z, clip = job.plan.noise_multiplier, self.options.privacy.clip
        stream = self._paid(job, f"{state} {digest(delta)}", Event(z, 1.0, 1), 1, units=1)
        return clipped(delta, clip) + stream.normal(delta.size) * np.float32(2 * clip * z)

    def _paid(self, job: Job, state: str, event: Event, per_job: int, units: int) -> SecureStream:
        """Charge the ledger for `event`; returns the noise of this job, the same only for the very
        same job.
        """
        o, plan = self.options.privacy, job.plan
        if not 0 < event.noise_multiplier < math.inf:
            raise BudgetExhausted(
                f"a job with noise {event.noise_multiplier:g}, which privacy={o.unit} forbids"
            )
        if not 0 < plan.delta < 1 / max(2, units):
            raise BudgetExhausted(
                f"delta {plan.delta:g} is not below one over the {units} units of this client"
            )
        if not (event.count >= 1 and plan.participations >= 1):
            raise BudgetExhausted(f"a job of {event.count} steps, one of {plan.participations}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".ledger.lock"):
            path = self.folder / "privacy.key"
            # it is made last: with it, there was a ledger
            fresh = plan.state_job < 0 and not path.exists()
            ledger = Ledger(
                self.folder / "ledger.json", o.unit, digest(self.tokens), plan.delta, fresh
            )
            key = secret_key(path, fresh)
            if o.rng == "seeded":
                key = hashlib.sha256(f"{self.options.seed} {job.client}".encode()).digest()
            told = json.dumps(_told(job, state, self.environment), sort_keys=True)
            tag = derive(
                key, "job", told
            ).hex()  # stands in the ledger: names the noise, and does not tell it
            planned = replace(event, count=plan.participations * per_job)
            budget = None if self._as_planned(ledger, event, planned) else o.target_epsilon
            ledger.charge(job.number, tag, event, budget)
            self.charged = float(sum(each.count for each in ledger.account.events))
        return SecureStream(key, "noise", tag)

    def _as_planned(self, ledger: Ledger, event: Event, planned: Event) -> bool:
        """Whether the whole plan is within this client's budget and the job within the plan.

        Then no epsilon need be computed for each job; and what a smaller shard pays, no larger one
        exceeds.
        """
        account, budget = ledger.account, self.options.privacy.target_epsilon
        if budget is None or not account.within(planned, event):
            return False
        about = (planned.noise_multiplier, planned.count, account.delta, budget)
        if planned.sampling_probability > _within.get(about, 0.0):
            if epsilon_of((planned,), account.delta) > budget:
                return False
            _within[about] = planned.sampling_probability
        return True


_within: dict[
    tuple[float, int, float, float], float
] = {}  # a plan -> the largest probability known to be in budget


def _told(job: Job, state: str, environment: dict[str, Any]) -> list[Any]:
    """All that the bits of a job's result depend on; not how the job came here, or what is kept for
    a restart.

    Nor the run, which has a key of its own: with seeded noise another run is to repeat this one.
    """
    plan = asdict(job.plan)
    if not job.plan.base_digest:  # nothing is frozen: the same noise as before there was a base
        del plan["base_digest"]
    for name in ("run", "keep", "seconds", "cached_version"):
        del plan[name]
    # the names that these two had first: another name would be other noise, and a resumed run would
    # pay again
    plan["steps"], plan["state"] = plan.pop("local_steps"), plan.pop("state_job")
    return [job.client, job.number, job.version, digest(job.params), plan, state, environment]
