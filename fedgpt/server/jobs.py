"""Makes jobs: their local steps, their client state and their place in the learning-rate
schedule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedgpt.core.messages import DIGESTS, OWN_TEXT, Job, JobTime, Pacing, Plan, ServerState
from fedgpt.core.options import RunOptions
from fedgpt.local.schedule import tokens_per_step
from fedgpt.server.parts import Parts
from fedgpt.storage.tables import Clients, RunIdentity, RunTotals
from fedgpt.update.downlink import Published

UNKNOWN = JobTime()  # the transport reports no time: the job is timed from its dispatch
SPEED_MEMORY = 0.5  # share of the old value in a client's smoothed speed


class JobPlanner:
    """Makes the jobs of a run, and measures the clients' speeds in the table of clients."""

    def __init__(
        self,
        parts: Parts,
        identity: RunIdentity,
        clients: Clients,
        extra: Mapping[str, np.ndarray],
    ):
        """`extra`: the arrays of a checkpoint, for a compressed downlink."""
        self.parts, self.identity, self.clients = parts, identity, clients
        options = parts.options
        self.published = Published(options.update.downlink, extra)
        self.step_tokens, self.job_tokens = tokens_per_step(options), tokens_per_job(options)
        self.tokens_total: int  # at which the schedule ends; `begin` sets it

    def begin(self, pacing: Pacing) -> None:
        """Fix the end of the schedule from the pacing with the clients that the run began with.

        Clients that join later would move it, and the learning rate would rise again.
        """
        self.tokens_total = tokens_total(self.parts.options, pacing, self.parts.strategy.switches)

    def job(
        self,
        client: str,
        start: ServerState,
        totals: RunTotals,
        pacing: Pacing,
        saved: Clients,
        now: float,
    ) -> Job:
        """The client's next job, which starts from `start`; uses up the client's next job number.

        `saved`: the table of clients in the newest snapshot, from which a restart would continue.
        """
        clients, parts = self.clients, self.parts
        number = clients.take_number(client)
        accepted = clients.accepted_number(client)
        restorable = clients.restorable_numbers(client) | {saved.accepted_number(client)}
        steps = self.steps(client)
        parts.privacy.asked(client, steps, clients)
        cached = clients.cached_version(client)
        deltas = self.published.steps(cached, start.version)
        plan = Plan(
            **self._schedule(totals, pacing),
            **parts.privacy.job_numbers(),
            local_steps=steps,
            numbers=parts.strategy.client_numbers(),
            state_job=accepted,
            keep=tuple(sorted({accepted, *restorable} - {-1})),
            downlink=parts.options.update.downlink,
            cached_version=-1 if deltas is None else cached,
            seconds=0.0 if parts.fleet is None else steps * parts.fleet.step_seconds(client),
            digests=self._digests(*(OWN_TEXT if parts.options.corpus.at_sites else DIGESTS)),
        )
        return Job(client, number, start.version, start.params, plan, now, deltas or ())

    def root_job(self, state: ServerState, totals: RunTotals, pacing: Pacing, every: int) -> Job:
        """The server's own job in a version, on public text; its number is the version.

        `every`: versions between checkpoints, which determine how many client states to keep.
        """
        version, options = state.version, self.parts.options
        oldest = max(0, version - options.checkpoint.keep * max(1, every) - 2)
        plan = Plan(
            **self._schedule(totals, pacing),
            local_steps=options.local.steps,
            state_job=version - 1,
            keep=tuple(range(oldest, version)),
            digests=self._digests("text"),
        )
        return Job("", version, version, state.params, plan)

    def _digests(self, *names: str) -> dict[str, str]:
        """The digests of these contents of the run, as far as the run has them."""
        environment = self.identity.environment
        return {name: environment[name] for name in names if name in environment}

    def steps(self, client: str) -> int:
        """Local steps of a job; under DyLU proportional to speed: floor(H v_i / max v) >= 1."""
        full, speeds = self.parts.options.local.steps, self.clients.speeds
        if not self.parts.options.pace.dylu or client not in speeds:
            return full
        # 0.29 * 100 is below 29
        return max(1, math.floor(full * speeds[client] / max(speeds.values()) + 1e-9))

    def measure(self, job: Job, now: float, job_time: JobTime = UNKNOWN) -> float:
        """Update a client's smoothed speed, as measured at the server; returns the seconds of the
        job.

        The first measured job sets the speed without smoothing.
        """
        took = now - job.sent if job_time.seconds is None else job_time.seconds
        if took > 0 and job_time.measured:
            self.clients.learn_speed(job.client, job.plan.local_steps / took, SPEED_MEMORY)
        return took

    def _schedule(self, totals: RunTotals, pacing: Pacing) -> dict[str, Any]:
        """The place of a job in the learning-rate schedule, by the tokens of all clients that
        train.
        """
        together = pacing.clients if pacing.name == "buffer" else pacing.goal
        return {
            "run": self.identity.run,
            "tokens_done": totals.tokens_done,
            "tokens_per_step": self.step_tokens * together,
            "tokens_total": self.tokens_total,
        }


def tokens_per_job(options: RunOptions) -> int:
    """Tokens of a job of `local.steps` steps."""
    return options.local.steps * tokens_per_step(options)


def tokens_total(options: RunOptions, pacing: Pacing, switches: bool) -> int:
    """Tokens at which the schedule ends; with `switches` the pacing may change, so rounds are
    counted.
    """
    updates = pacing.clients if switches else pacing.goal
    return options.tokens or options.rounds * updates * tokens_per_job(options)


def job_seconds(
    steps: int,
    done: Iterable[str],
    in_flight: Iterable[Job],
    speeds: Mapping[str, float],
    now: float,
) -> dict[str, float]:
    """Seconds of a job of `steps` local steps, for each client that is `done` or has a job.

    A job in flight is timed as if its reply arrived now. A client that was never measured counts as
    the slowest measured client, unless its job has already taken longer.
    """
    known = {client: speeds[client] for client in sorted(done) if client in speeds}
    new = {}
    for job in in_flight:
        before = speeds.get(job.client)
        so_far = job.plan.local_steps / max(now - job.sent, 1e-9)
        if before is None:
            new[job.client] = so_far
        else:
            smoothed = SPEED_MEMORY * before + (1 - SPEED_MEMORY) * so_far
            known[job.client] = min(before, smoothed)
    slowest = min(known.values(), default=math.inf)
    seconds = {client: steps / speed for client, speed in known.items()}
    return seconds | {client: steps / min(speed, slowest) for client, speed in new.items()}
