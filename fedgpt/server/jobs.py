"""Jobs: how many steps, from which state, under which part of the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedgpt.core.messages import Job, Pacing, Plan, ServerState
from fedgpt.core.options import RunOptions
from fedgpt.server.privacy import Privacy
from fedgpt.simulate.fleet import Fleet
from fedgpt.storage.checkpoint import RunTables
from fedgpt.update.downlink import Published

SPEED_MEMORY = 0.5  # share of the old value in a client's smoothed speed


class JobPlanner:
    """Makes the jobs of a run; everything that changes is in the ledgers."""

    def __init__(
        self,
        options: RunOptions,
        published: Published,
        fleet: Fleet | None = None,
        switches: bool = False,
        privacy: Privacy | None = None,
    ):
        """`fleet` slows the clients of a real clock down; `switches`: the pacing may change."""
        self.options = options
        self.published = published
        self.fleet = fleet
        self.switches = switches
        self.privacy = privacy or Privacy()
        local, model = options.local, options.model
        self.step_tokens = local.accumulate * local.batch_size * model.block_size
        self.job_tokens = local.steps * self.step_tokens  # of a whole job

    def job(
        self,
        client: str,
        state: ServerState,
        tables: RunTables,
        pacing: Pacing,
        numbers: dict[str, float],
        now: float,
        saved: Mapping[str, int],
    ) -> Job:
        """The client's next job; takes its number. `saved`: accepted tasks of the newest
        snapshot.
        """
        number = tables.next_number.get(client, 0)
        tables.next_number[client] = number + 1
        accepted = tables.accepted.get(client, -1)
        restorable = {table[client] for table in (*tables.restorable, saved) if client in table}
        steps = self.steps(client, tables.speeds)
        self.privacy.asked(client, steps, tables)
        held = tables.held.get(client, -1)
        known = self.published.steps(held, state.version)
        plan = Plan(
            **self._schedule(tables, pacing),
            **self.privacy.job_numbers(),
            local_steps=steps,
            numbers=numbers,
            state_job=accepted,
            keep=tuple(sorted({accepted, *restorable} - {-1})),
            downlink=self.options.update.downlink,
            cached_version=-1 if known is None else held,
            seconds=0.0 if self.fleet is None else steps * self.fleet.step_seconds(client),
            base_digest=tables.environment.get("base", ""),
        )
        return Job(client, number, state.version, state.params, plan, now, known or ())

    def root_job(
        self, state: ServerState, tables: RunTables, pacing: Pacing, checkpoint_every: int
    ) -> Job:
        """The server's own job in a version, on public text; its task is the version."""
        version = state.version
        oldest = max(0, version - self.options.checkpoint.keep * max(1, checkpoint_every) - 2)
        plan = Plan(
            **self._schedule(tables, pacing),
            local_steps=self.options.local.steps,
            state_job=version - 1,
            keep=tuple(range(oldest, version)),
        )
        return Job("", version, version, state.params, plan)

    def restored(
        self, tables: RunTables, extra: Mapping[str, np.ndarray], params: np.ndarray
    ) -> list[Job]:
        """The jobs that were in flight at a checkpoint, with the vectors they began from; the
        newest is `params`.
        """
        jobs = []
        for about in tables.in_flight:
            # their steps may be gone
            told = {
                **about["plan"],
                "keep": tuple(about["plan"]["keep"]),
                "cached_version": -1,
            }
            base = extra.get(f"base/{about['version']}", params)
            jobs.append(
                Job(
                    about["client"],
                    about["number"],
                    about["version"],
                    base,
                    Plan(**told),
                    about["sent"],
                )
            )
        return jobs

    def steps(self, client: str, speeds: dict[str, float]) -> int:
        """Local steps; under DyLU in proportion to the client's speed: floor(H v_i / max v), at
        least 1.
        """
        full = self.options.local.steps
        if not self.options.pace.dylu or client not in speeds:
            return full
        # 0.29 * 100 is below 29
        return max(1, math.floor(full * speeds[client] / max(speeds.values()) + 1e-9))

    def measure(
        self, job: Job, now: float, speeds: dict[str, float], seconds: float | None = None
    ) -> float:
        """Smooth a client's speed, in local steps a second as the server sees them; returns how
        long the job took.

        `seconds` as in `Reply`. The first job that is measured counts in full.
        """
        took = now - job.sent if seconds is None or math.isnan(seconds) else seconds
        if took > 0 and (seconds is None or not math.isnan(seconds)):
            speeds[job.client] = self._smoothed(speeds.get(job.client), job.plan.local_steps / took)
        return took

    def job_seconds(
        self, done: Iterable[str], in_flight: Iterable[Job], speeds: Mapping[str, float], now: float
    ) -> dict[str, float]:
        """Seconds of a whole job of those who are `done` and of the clients at work, as if these
        came back now.

        One of which nothing is known counts as the slowest that is, unless it is out for longer.
        """
        full = self.options.local.steps
        known = {client: speeds[client] for client in sorted(done) if client in speeds}
        new = {}
        for job in in_flight:
            before = speeds.get(job.client)
            so_far = job.plan.local_steps / max(now - job.sent, 1e-9)
            if before is None:
                new[job.client] = so_far
            else:
                known[job.client] = min(before, self._smoothed(before, so_far))
        slowest = min(known.values(), default=math.inf)
        return {client: full / speed for client, speed in known.items()} | {
            client: full / min(speed, slowest) for client, speed in new.items()
        }

    def tokens_total(self, pacing: Pacing) -> int:
        """Where the schedule ends; a round has `pace.clients` jobs where the pacing may change."""
        updates = pacing.clients if self.switches else pacing.goal
        return self.options.tokens or self.options.rounds * updates * self.job_tokens

    def _smoothed(self, old: float | None, new: float) -> float:
        return new if old is None else SPEED_MEMORY * old + (1 - SPEED_MEMORY) * new

    def _schedule(self, tables: RunTables, pacing: Pacing) -> dict[str, Any]:
        """Where a job stands in the run: all clients that train beside it move the clock of tokens,
        too.
        """
        together = pacing.clients if pacing.name == "buffer" else pacing.goal
        return {
            "run": tables.run,
            "tokens_done": tables.tokens_done,
            "tokens_per_step": self.step_tokens * together,
            "tokens_total": self.tokens_total(pacing),
        }
