"""Privacy at the client: its secret key, its ledger, and the checks before each release."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fedgpt.client.account import Promise, SiteAccount
from fedgpt.core.messages import Job, plan_as_json
from fedgpt.core.options import RunOptions
from fedgpt.data.examples import ExampleSet
from fedgpt.data.text import Text
from fedgpt.local.private import PrivateSteps
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.clipping import clipped
from fedgpt.privacy.ledger import BudgetExhausted, Ledger
from fedgpt.privacy.plan import client_participations, sampling_probability
from fedgpt.privacy.randomness import SecureStream, derive, secret_key
from fedgpt.tasks.base import Task
from fedgpt.update.wire import digest

# groups of options that have an effect on a job's result before it is compressed, which hides
# nothing and shows nothing
SETTINGS = ("model", "task", "local", "privacy")


class ClientPrivacy:
    """The private part of one client's job; the client's ledger is charged before each release.

    The client does not trust the server: it checks all numbers of the job against its own options.
    """

    def __init__(
        self,
        options: RunOptions,
        folder: Path,
        text: Text,
        environment: dict[str, Any],
        task: Task,
        account: SiteAccount | None = None,
    ):
        """`folder` contains the client's key and ledger.

        `environment`: everything besides the job that determines the bits of a result, such as the
        device. `account` counts the releases of all runs of a site.
        """
        self.options = options
        self.folder = folder
        self.text = text
        self.task = task
        self.environment = environment
        self.account = account
        # releases that the ledger was charged for, including those of the present job
        self.charged = 0.0

    @cached_property
    def units(self) -> ExampleSet:
        """The units of privacy of privacy=example."""
        return self.task.units(self.text, self.options.model.block_size)

    def steps(self, job: Job, state: str) -> PrivateSteps:
        """privacy=example: the settings of the private steps of `job`.

        `state` identifies the optimiser moments from which the job starts.
        """
        o = self.options
        units = self.units
        probability = sampling_probability(o, len(units))
        event = Event(job.plan.noise_multiplier, probability, job.plan.local_steps)
        stream = self._paid(job, state, event, o.local.steps, len(units))
        return PrivateSteps(units, stream, probability, job.plan.noise_multiplier, o.privacy.clip)

    def hidden(self, job: Job, delta: np.ndarray, state: str) -> np.ndarray:
        """privacy=local: the clipped update with noise.

        The sensitivity is 2 C, since one clipped update may be replaced by any other.
        """
        z, clip = job.plan.noise_multiplier, self.options.privacy.clip
        stream = self._paid(job, f"{state} {digest(delta)}", Event(z, 1.0, 1), 1, units=1)
        return clipped(delta, clip) + stream.normal(delta.size) * np.float32(2 * clip * z)

    def _paid(self, job: Job, state: str, event: Event, per_job: int, units: int) -> SecureStream:
        """Charge the ledger for `event`; returns the noise. Only a repetition of the same job gets
        the same noise.
        """
        o, plan = self.options.privacy, job.plan
        if not 0 < event.noise_multiplier < math.inf:
            raise BudgetExhausted(
                f"the job has noise {event.noise_multiplier:g}, which privacy={o.unit} forbids"
            )
        if not 0 < plan.delta < 1 / max(2, units):
            raise BudgetExhausted(
                f"delta {plan.delta:g} is not below 1 / {units}, one over this client's units"
            )
        if not (event.count >= 1 and plan.participations >= 1):
            raise BudgetExhausted(
                f"the job has {event.count} steps and is one of {plan.participations} jobs"
            )
        if self.account is not None:
            self.account.begin()  # before there is a ledger, which proves that it was there
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".ledger.lock"):
            path = self.folder / "privacy.key"
            # the key is written after the ledger, so if the key exists, the ledger existed
            fresh = plan.state_job < 0 and not path.exists()
            ledger = Ledger(
                self.folder / "ledger.json", o.unit, digest(self.text.tokens), plan.delta, fresh
            )
            key = secret_key(path, fresh)
            if o.rng == "seeded":
                key = hashlib.sha256(f"{self.options.seed} {job.client}".encode()).digest()
            inputs = _inputs(job, state, self.environment)
            if o.rng == "secure":  # seeded noise is no secret, and follows the seed alone
                inputs.append(settings_of(self.options))
            inputs = json.dumps(inputs, sort_keys=True)
            # identifies the noise in the ledger without revealing it
            tag = derive(key, "job", inputs).hex()
            planned = replace(event, count=plan.participations * per_job)
            if self.account is not None and not ledger.known(job.number, tag):
                done = sum(each.count for each in ledger.account.events)
                left = replace(event, count=max(event.count, planned.count - done))
                self.account.charge(event, left)
            budget = None if self._as_planned(ledger, event, planned) else o.target_epsilon
            ledger.charge(job.number, tag, event, budget)
            self.charged = float(sum(each.count for each in ledger.account.events))
        return SecureStream(key, "noise", tag)

    def _as_planned(self, ledger: Ledger, event: Event, planned: Event) -> bool:
        """Whether the job is part of the plan and the complete plan is within the client's budget.

        Then no epsilon has to be computed for single jobs. A larger sampling probability (a smaller
        shard) costs more, so the cache stores the largest probability that the budget allows.
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


# (noise multiplier, count, delta, budget) of a plan -> largest sampling probability within budget
_within: dict[tuple[float, int, float, float], float] = {}


def _inputs(job: Job, state: str, environment: dict[str, Any]) -> list[Any]:
    """Everything that determines the bits of a job's result, besides the options.

    The transport of the job and the client states kept for a restart do not affect the result. The
    run's id is excluded, because each run has its own key and seeded noise must be the same in a
    repeated run.
    """
    # uses the field names of messages: a renamed field would change the noise, and a resumed run
    # would be charged again
    plan = plan_as_json(job.plan)
    for name in ("run", "keep", "seconds", "held"):
        del plan[name]
    return [job.client, job.number, job.version, digest(job.params), plan, state, environment]


def settings_of(options: RunOptions) -> dict[str, Any]:
    """The options that have an effect on the result of a job, as far as they are no defaults.

    Under the id of a run a server may send other options: two results with the same noise would
    show what the noise hides. An option that a later version of fedgpt adds changes nothing here
    as long as it has its default, so that a run can go on.
    """
    standard = RunOptions()
    found: dict[str, Any] = {"seed": options.seed}
    for part in SETTINGS:
        usual = asdict(getattr(standard, part))
        own = asdict(getattr(options, part))
        found[part] = {name: value for name, value in own.items() if value != usual[name]}
    return found


def settings_digest(options: RunOptions) -> str:
    """Hexadecimal sha256 of `settings_of`."""
    return hashlib.sha256(json.dumps(settings_of(options), sort_keys=True).encode()).hexdigest()


def promise_of(options: RunOptions) -> Promise | None:
    """What a run with privacy=client promises for its jobs; None if its noise is fixed instead."""
    o = options.privacy
    if o.target_epsilon is None or o.delta is None:
        return None
    jobs = client_participations(options)
    return Promise(o.target_epsilon, o.delta, jobs, settings_digest(options))


def job_digest(job: Job, text: Text) -> str:
    """Hexadecimal sha256 of a job with the text that it is done on."""
    inputs = json.dumps([_inputs(job, "", {}), digest(text.tokens)], sort_keys=True)
    return hashlib.sha256(inputs.encode()).hexdigest()
