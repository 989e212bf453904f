"""The server loop, one for every pacing: dispatch, receive, step, record.

A version is open from one server step to the next. Meanwhile the server dispatches jobs to clients
and receives replies one at a time. It validates and collects each reply, or rejects it. When the
pacing closes the version, the server takes a step: it computes the next global model from the
collected updates, records it (metrics, snapshot, checkpoint, evaluation), and opens the next
version.

docs/architecture.md follows one update through this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedgpt.core.errors import ConfigError, FedGPTError, Interrupted, StoppedEarly, UpdateRejected
from fedgpt.core.events import (
    ClientJoined,
    Event,
    JobSent,
    MetricsReady,
    Observer,
    QuarantineBegun,
    QuarantineEnded,
    ReplyRejected,
    RunOpened,
    UpdateAccepted,
    VersionMade,
)
from fedgpt.core.faults import reach
from fedgpt.core.messages import ClientInfo, Job, JobTime, Reply, ServerState, Update
from fedgpt.server.background_evaluation import BackgroundEvaluation
from fedgpt.server.collector import Collectors, UpdateCollector, model_length
from fedgpt.server.in_flight import InFlight, Key, restored_jobs
from fedgpt.server.jobs import JobPlanner
from fedgpt.server.metrics_line import RunMetrics, counted, line_of_version, summary
from fedgpt.server.observers import Observers
from fedgpt.server.pacing import Progress, Roster, versions_per_round
from fedgpt.server.parts import Parts
from fedgpt.server.quarantine import Quarantine
from fedgpt.server.run_pacing import RunPacing
from fedgpt.server.saver import Saver
from fedgpt.server.version import OpenVersion
from fedgpt.storage.checkpoint import Snapshot
from fedgpt.storage.tables import VersionLine

# seconds that the server waits for clients to connect: those that are started with it, and sites,
# which their owners start when they can
MEETING_SECONDS, SITES_SECONDS = 300.0, 24 * 3600.0
# consecutive failed jobs after which the run stops, for each update that a server step needs
MOST_FAILURES = 10
POLICY = "policy"  # code of a job that is beyond the policy of a site
# codes of jobs that are no failure: their clients get other jobs when they can take them
EXCUSED = (POLICY, "offline")
BLAMELESS = ("stale",)  # codes of failed jobs for which their client gets no strike
log = logging.getLogger(__name__)


def meeting_seconds(at_sites: bool) -> float:
    """Seconds that the server waits for its clients to connect."""
    return SITES_SECONDS if at_sites else MEETING_SECONDS


class Server:
    """A run from its first version, or from a snapshot, to its last."""

    def __init__(self, parts: Parts, snapshot: Snapshot, observers: Sequence[Observer] = ()):
        options, identity = parts.options, snapshot.identity
        self.parts, self.transport = parts, parts.transport
        self.state, self.totals = snapshot.state, snapshot.totals
        self.clients = snapshot.clients.frozen()
        # an interrupted server saves an extra checkpoint, whose client states a restart may need
        self.clients.remember_accepted()
        self.saver = Saver(parts, snapshot)
        self.metrics = RunMetrics(snapshot)
        self.evaluation = BackgroundEvaluation(options.evaluate, parts.evaluator, self._publish)
        self.observers = Observers(observers)
        self.planner = JobPlanner(parts, identity, self.clients, snapshot.extra)
        self.pacing = RunPacing(self.planner, snapshot.totals.pacing, self._tell)
        self.quarantine = Quarantine(options.validate, self.clients)
        self.jobs = InFlight(parts.transport)
        size = self.state.params.size
        self.collectors = Collectors(options, parts.strategy, parts.privacy, size, identity.run)
        self.current: OpenVersion  # the version under way; there is none before `_open_version`

    def run(self) -> dict[str, Any]:
        """Train to the last version; returns the content of summary.json."""
        try:
            self._open()
            while self._part_done() < 1:
                if self.current.collector.full or self.pacing.pace.due(self._progress()):
                    self._step()
                else:
                    self._dispatch()
                    self._receive()
            self._end(over=True)
            return self._summary()
        except StoppedEarly:
            self._end(over=True)
            raise
        except KeyboardInterrupt:
            self._end(over=False)
            raise Interrupted(str(self.parts.folder.path)) from None
        except (FedGPTError, OSError):  # for instance a full disk
            self.saver.checkpoints.ended()  # a run that stopped with a message did not crash
            raise
        finally:
            self._close()

    # ---- open

    def _open(self) -> None:
        """Wait for the clients, send the jobs that were in flight again, and open a version."""
        state = self.state
        self.saver.checkpoints.started(state.version)
        if self.parts.options.checkpoint.every != 0:
            self.saver.save()
        self.evaluation.complete(self.metrics.line, state.params)
        patience = meeting_seconds(self.parts.options.corpus.at_sites)
        infos = self.transport.clients(timeout=patience)
        if not infos:
            raise StoppedEarly(f"no client connected within {patience:.0f} s")
        self.clients.meet(info.id for info in infos)
        pacing = self.pacing.numbers  # pace.clients=0 becomes a number now
        if problems := list(self.parts.strategy.problems(pacing)):
            raise ConfigError(problems)
        self.parts.privacy.meet(infos)
        begun_with = self.totals.begun_with or len(self.clients)
        self.totals = replace(self.totals, begun_with=begun_with)
        self.planner.begin(self.pacing.pace.pacing(begun_with))
        total, now = self.planner.tokens_total, self.transport.now()
        self._tell(RunOpened(tuple(infos), state.version, total, now))
        if self.parts.fleet is not None:
            self.parts.fleet.meet(self.clients.ids)
        snapshot = self.saver.snapshot
        self.jobs.send(restored_jobs(snapshot.in_flight, snapshot.extra, state.params))
        self._open_version()

    def _open_version(self) -> None:
        """Open the next version, without updates, and fix the limits on its updates."""
        collector = self._open_collector()
        start = replace(self.state, params=self.planner.published.advance(self.state))
        self.current = OpenVersion(start, collector, self.transport.now())
        for client in self.clients.end_rests(self.state.version):
            now = self.transport.now()
            self._tell(QuarantineEnded(client, self.state.version, now))

    def _open_collector(self) -> UpdateCollector:
        most = self.pacing.pace.max_updates(len(self.clients)) + len(self.jobs)
        return self.collectors.open(self.state, self.totals.norms, most, self.clients)

    # ---- dispatch

    def _dispatch(self) -> None:
        """Give jobs to the clients that the pacing chooses, from the newest model."""
        if joined := self.transport.newcomers():
            self._admit(joined)
        chosen = self._choose()
        if chosen is None:
            return
        if not self.current.asked:
            self.current.asked, self.current.began = True, self.transport.now()
        self.totals = self.totals.plus(dispatched=len(chosen))
        job = partial(
            self.planner.job,
            start=self.current.start,
            totals=self.totals,
            pacing=self.pacing.numbers,
            saved=self.saver.snapshot.clients,
            now=self.transport.now(),
        )
        self._send([job(client) for client in chosen])

    def _admit(self, joined: Sequence[ClientInfo]) -> None:
        """Let clients that have just joined take part."""
        self.clients.join(joined)
        self.parts.privacy.meet(joined)
        for info in joined:
            now = self.transport.now()
            self._tell(ClientJoined(info.id, info.tokens, self.state.version, now))
        if not self.current.asked and not len(self.current.collector):
            self.current.collector = self._open_collector()  # a cohort may be larger now

    def _choose(self) -> list[str] | None:
        """The clients that get a job now; None: nobody can be asked yet."""
        busy = self.jobs.busy
        if not self.current.asked:  # of a version that waited, some clients are done
            busy = busy | {update.client for update in self.current.collector.accepted}
        roster = Roster(
            self.clients.ids,
            busy,
            lambda client: self._may_ask(client) and self.transport.available(client),
        )
        chosen = self.pacing.pace.start(self._progress(), roster)
        if chosen and not self.pacing.pace.keeps_jobs:
            # a version that waited has room for as many as it began with, though others have joined
            collector = self.current.collector
            chosen = chosen[: collector.limits.max_updates - len(collector)]
        if not chosen and not len(self.jobs) and not any(map(self._may_ask, self.clients.ids)):
            reasons = f"{self.quarantine.summary()}{self.parts.privacy.reason}"
            raise StoppedEarly(f"no client may be asked: {reasons}")
        return chosen

    def _may_ask(self, client: str) -> bool:
        if self.clients.is_resting(client):
            return False
        return self.parts.privacy.may_ask(client, self.state.version, self.clients)

    def _send(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        for job in jobs:
            self.totals = self.totals.plus(bytes_down=self.transport.bytes_down(job))
            steps, now = job.plan.local_steps, self.transport.now()
            self._tell(JobSent(job.client, job.number, job.version, steps, now))
        self.jobs.send(jobs)

    # ---- receive

    def _receive(self) -> None:
        """Wait for one reply and collect its update, or give up an overdue job."""
        progress = self._progress()
        if self.pacing.pace.due(progress):
            return
        if not self.jobs.has_reply and self._give_up_overdue():
            return
        reply = self.jobs.next_reply(self.pacing.patience(progress, self.jobs.oldest()))
        if reply is None:
            self._advise()
        else:
            self._handle(reply)

    def _give_up_overdue(self) -> bool:
        oldest = self.jobs.oldest()
        left = self.pacing.seconds_left(oldest)
        if left is None or oldest is None or left > 0:
            return False
        why = f"no reply within pace.deadline={self.parts.options.pace.deadline:g} s"
        self._give_up([(oldest.client, oldest.number)], why, missed=True)
        return True

    def _give_up(self, keys: list[Key], why: str, missed: bool) -> None:
        """Give up these jobs; with `missed` their clients had enough time, and each gets a
        strike.
        """
        for client, number in keys:
            job = self.jobs.pop(client, number)
            if missed and job is not None:  # the client is at least as slow as this
                self.planner.measure(job, self.transport.now())
            self._reject("no_reply", client, number, why)
            if missed and self._is_away(client):
                self.current.failed += 1  # it is not to blame, and gets no job until it is back
            else:
                self._fail(client if missed and self.transport.available(client) else None)
        self.transport.abandon(keys)

    def _is_away(self, client: str) -> bool:
        """Whether a real client is offline, or its policy refuses jobs for some time."""
        return not self.transport.virtual and not self.transport.available(client)

    def _handle(self, reply: Reply) -> None:
        """Validate one reply and collect its update; a rejected one changes only counters."""
        self.totals = self.totals.plus(bytes_up=reply.bytes)
        job = self.jobs.pop(reply.client, reply.number)
        excused = reply.code in EXCUSED
        if job is not None and reply.error and not excused and job.plan.cached_version >= 0:
            self._send_complete(job)
            return
        try:
            if job is None:
                code = self.clients.reason_for_stray(reply.client, reply.number)
                raise UpdateRejected(code, "not in flight")
            tokens = job.plan.local_steps * self.planner.step_tokens
            update = self.current.collector.read(reply, job, tokens)
            self._accept(update, job, reply.job_time)
            self._advise()
        except UpdateRejected as rejection:
            self._reject(rejection.code, reply.client, reply.number, rejection.detail)
            if job is not None and rejection.code in EXCUSED:
                self._excuse(job, rejection.code)
            elif job is not None:
                self._fail(None if rejection.code in BLAMELESS else reply.client)

    def _excuse(self, job: Job, code: str) -> None:
        """Count a job that a site's policy refuses, or whose client is offline; a cohort that
        consists of such jobs only is chosen again when a client may be asked.
        """
        self.current.failed += 1
        if code == POLICY:  # one that is offline may have done the job
            self.parts.privacy.refused(job, self.clients)
        answered = len(self.jobs) + len(self.current.collector)
        if not answered and not self.pacing.pace.keeps_jobs:
            self.current.asked = False

    def _send_complete(self, job: Job) -> None:
        """Send the same job with all parameters, because the client may have lost its cached
        model.
        """
        plan = replace(job.plan, cached_version=-1)
        now = self.transport.now()
        self._send([replace(job, plan=plan, model_deltas=(), sent=now)])

    def _accept(self, update: Update, job: Job, job_time: JobTime) -> None:
        """Count a valid update; raises UpdateRejected where it is too old or does not fit."""
        staleness, privacy = self._staleness(update), self.parts.privacy
        update = self.current.collector.add(update, job, staleness)
        took = self.planner.measure(job, self.transport.now(), job_time)
        if not privacy.central:  # what single updates show is not noised
            self.metrics.diagnostics.update(update, self.pacing.pace.keeps_jobs)
        privacy.answered(update, self.clients)
        self.quarantine.succeeded()
        self.clients.accept(update, took)
        if len(self.current.collector) == (self.parts.options.pace.goal or 1):
            self.current.goal_reached = self.transport.now()
        about = update.client, update.number, update.version, update.tokens
        now = self.transport.now()
        self._tell(UpdateAccepted(*about, staleness, took, job_time.measured, now))
        reach("accepted")

    def _staleness(self, update: Update) -> int:
        """Versions made since the client got its model; raises UpdateRejected for too many."""
        staleness = self.state.version - update.version
        limit = self.parts.options.pace.max_staleness
        if limit is not None and staleness > limit:
            detail = f"{staleness} versions old, pace.max_staleness={limit}"
            raise UpdateRejected("stale", detail)
        return staleness

    def _reject(self, code: str, client: str, number: int, detail: str) -> None:
        self.current.rejections[code] += 1
        self.totals = self.totals.plus_rejected(code)
        self._tell(ReplyRejected(code, client, number, detail, self.transport.now()))

    def _fail(self, client: str | None) -> None:
        """Count a failed job, and a strike against `client` if given; stop if all jobs fail."""
        self.current.failed += 1
        pacing, version = self.pacing.numbers, self.state.version
        until = self.quarantine.failed(client, version, versions_per_round(pacing))
        if client is not None and until is not None:
            self._tell(QuarantineBegun(client, until, version, self.transport.now()))
        if self.quarantine.failures >= MOST_FAILURES * max(pacing.clients, pacing.goal):
            failures = f"{self.quarantine.failures} jobs in a row failed"
            raise StoppedEarly(f"{failures}: {self._reasons()}")

    # ---- step

    def _step(self) -> None:
        """Make the next version from the collected updates, record it, and open the version after
        it. A version that must wait for clients stays open.
        """
        if not self._close_version():
            return
        reach("aggregate")
        before, part = self.state, self._part_done()
        self.state = self._next(before)
        model_length(self.state)  # a run that has diverged ends here
        self._count_version()
        line = self.metrics.line = self._line(before, part)
        self._advise(line.metrics)
        if self.parts.options.evaluate.rollback is not None and line.score:
            self._keep_or_restore()
        self._record()
        self._open_version()

    def _next(self, state: ServerState) -> ServerState:
        """The state after this step; with the same model if coins have chosen too few clients, or
        such that are away.
        """
        collector, needed = self.current.collector, self.parts.strategy.needed
        asked = len(collector) + self.current.failed
        if self.current.skipped:
            log.warning(
                "version %d leaves the model as it is: clients that coins chose are away",
                state.version + 1,
            )
            return replace(state, version=state.version + 1)
        if self.parts.options.pace.rate is not None and 0 < asked < needed:
            about = state.version + 1, asked, self.parts.strategy.name, needed
            log.warning(
                "version %d leaves the model as it is: coins chose %d clients, strategy=%s needs at"
                " least %d updates a server step",
                *about,
            )
            return replace(state, version=state.version + 1)
        return collector.step(state, self.pacing.numbers, self._root())

    def _close_version(self) -> bool:
        """Give up a cohort's jobs when its version closes; whether the version can be made.

        If too few updates are valid the run stops, unless real clients are away, who come and go:
        then the cohort is completed by other clients, or by these when they are back.
        """
        if self.pacing.pace.keeps_jobs:
            return True
        current, options = self.current, self.parts.options.pace
        enough = current.goal_reached is not None and options.goal is not None
        self._give_up(self.jobs.keys(), "the version closed first", missed=not enough)
        accepted = len(current.collector)
        # with privacy=client, the number of updates must not be revealed
        minimum = 0 if self.parts.privacy.central else options.minimum
        if not current.failed or accepted >= minimum or current.collector.full:
            return True
        got = f"version {self.state.version + 1} got {accepted} valid updates of"
        got += f" {accepted + current.failed} jobs, pace.minimum={minimum}: {self._reasons()}"
        if not any(map(self._is_away, self.clients.ids)):
            raise StoppedEarly(got)
        if options.rate is not None:  # the coins of a version are tossed once
            current.skipped = True
            return True
        log.warning("%s; it waits for clients that are away", got)
        current.asked = False
        return False

    def _root(self) -> Callable[[], Update] | None:
        """A function that trains the server's own update of this version; None if the rule needs
        none.
        """
        if not self.parts.strategy.needs_root:
            return None
        root = self.parts.root
        assert root is not None, "a rule that needs a root update gets its trainer"
        self.evaluation.wait()  # both compute on the server's device: one at a time
        pacing, every = self.pacing.numbers, self._checkpoint_every()
        return partial(root, self.planner.root_job(self.state, self.totals, pacing, every))

    def _count_version(self) -> None:
        """Bring the totals to the new version."""
        collector, job_tokens = self.current.collector, self.planner.job_tokens
        pacing = self.pacing.numbers
        trained = self.parts.privacy.tokens(collector.accepted, pacing, job_tokens)
        self.totals = replace(
            self.totals.plus(tokens_done=trained),
            seconds=self.transport.now(),
            wall_seconds=self.metrics.wall_seconds(),
            norms=collector.norms_after(self.totals.norms),
        )

    def _line(self, before: ServerState, part: float) -> VersionLine:
        """The new version's line of metrics; `part`: the share of the run before it."""
        metrics = line_of_version(self.current, self.totals, self.clients, self.jobs)
        every = self.pacing.versions_between(self.parts.options.evaluate.every)
        line = self.evaluation.plan(VersionLine(metrics), part, self._part_done(), every)
        private = self.parts.privacy.metrics(self.clients) if line.score else {}
        step = self.metrics.diagnostics.step(before.params - self.state.params)
        return replace(line, metrics={**metrics, **private, **step, "pacing": self.pacing.name})

    def _keep_or_restore(self) -> None:
        """Score the new version and roll back to the best weights if its score is too bad."""
        line = self.metrics.line
        scores = self.evaluation.scores(self.state, line.sample)
        value = scores[self.parts.scoring.score.name]
        self.state, restored = self.saver.best.decide(self.state, value)
        metrics = {**line.metrics, **scores, **restored}
        self.metrics.line = VersionLine(metrics, score=False, sample=False)

    # ---- record

    def _record(self) -> None:
        """Record the new version: event, snapshot, checkpoint if one is due, evaluation."""
        # before the snapshot, because a restart deletes the events after its snapshot
        self._tell(VersionMade(self.metrics.line.metrics, self.transport.now()))
        every = self._checkpoint_every()
        due = bool(every and self.state.version % every == 0)
        if due:  # one table more than checkpoints, because the newest may still be being written
            self.clients.remember_accepted(self.parts.options.checkpoint.keep + 1)
        self.saver.take(self._snapshot())
        if due:
            self.evaluation.wait()  # metrics.jsonl must contain every version of a checkpoint
            self.saver.save()
        self.evaluation.complete(self.metrics.line, self.state.params)

    def _snapshot(self) -> Snapshot:
        """State and tables between two versions; jobs that are sent later do not change the
        snapshot.
        """
        bases = {f"base/{version}": base for version, base in self.jobs.bases.items()}
        return Snapshot(
            self.state,
            self.saver.snapshot.identity,
            self.metrics.line,
            replace(self.totals, pacing=self.pacing.changed_to),
            self.clients.frozen(),
            self.jobs.as_json(),
            self.parts.strategy.unsaved,
            {
                **bases,
                **self.metrics.diagnostics.memory(),
                **self.saver.best.memory(),
                **self.planner.published.memory(),
            },
        )

    def _publish(self, metrics: dict[str, Any], params: np.ndarray | None) -> None:
        """Write and publish a version's complete line; called by the evaluation's thread."""
        self.saver.best.keep(metrics, params)
        self.parts.folder.metrics.append(metrics)
        reach("evaluated")
        self.observers.publish(MetricsReady(metrics))

    # ---- end

    def _end(self, over: bool) -> None:
        """Stop in an orderly way; with `over` a restart would stop at the same place again."""
        self.evaluation.wait()
        self.saver.end(over)

    def _close(self) -> None:
        with ExitStack() as last_first:  # each is closed, also where closing another one raises
            last_first.callback(self.observers.close)  # a slow observer keeps nothing else waiting
            last_first.callback(self.transport.close)
            last_first.callback(self.saver.checkpoints.close)
            last_first.callback(self.evaluation.close)

    def _summary(self) -> dict[str, Any]:
        parts, identity = self.parts, self.saver.snapshot.identity
        lines, virtual = parts.folder.metrics.read(), self.transport.virtual
        return summary(lines, self.state, self.totals, identity, parts.scoring, virtual)

    # ---- helpers

    def _advise(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Let the strategy change the pacing; `metrics`: the line of a new version."""
        accepted = self.current.collector.accepted
        self.state = self.pacing.advise(accepted, self.jobs, self.state, metrics)

    def _progress(self) -> Progress:
        return self.current.progress(self.totals, len(self.jobs), self.transport.now())

    def _part_done(self) -> float:
        """Share of the run that is complete, from 0 to 1; by tokens if rounds do not end the
        run.
        """
        options, strategy = self.parts.options, self.parts.strategy
        if options.tokens or strategy.switches:
            return min(1.0, self.totals.tokens_done / self.planner.tokens_total)
        return self.state.version / options.rounds

    def _checkpoint_every(self) -> int:
        return self.pacing.versions_between(self.parts.options.checkpoint.every)

    def _reasons(self) -> str:
        rejected = counted(self.current.rejections)
        return f"{rejected}; see events.jsonl in {self.parts.folder.path}"

    def _tell(self, event: Event) -> None:
        """Write an event to events.jsonl, except the opening, and deliver it to observers."""
        if not isinstance(event, RunOpened):
            self.parts.folder.events.append(event.as_json())
        self.observers.publish(event)
