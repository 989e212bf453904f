"""The server loop: one for every pacing. Choose, dispatch, collect, validate, advance, evaluate,
checkpoint.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.core.errors import ConfigError, FedGPTError, Interrupted, StoppedEarly, UpdateRejected
from fedgpt.core.faults import reach
from fedgpt.core.messages import Job, Reply, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.core.score import LANGUAGE, Scoring
from fedgpt.core.transport import Transport
from fedgpt.server.collector import UpdateCollector, model_length
from fedgpt.server.diagnostics import Diagnostics
from fedgpt.server.evaluation import BackgroundEvaluation, Evaluator
from fedgpt.server.in_flight import InFlight
from fedgpt.server.jobs import JobPlanner
from fedgpt.server.limits import Quarantine, remembered
from fedgpt.server.metrics import counted, line_of_version, summary
from fedgpt.server.pacing import Progress, Roster, make_pace, versions_per_round
from fedgpt.server.pacing_advisor import PacingAdvisor
from fedgpt.server.privacy import Privacy
from fedgpt.simulate.fleet import Fleet
from fedgpt.storage.best_weights import BestWeights
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.journal import RecordedTransport
from fedgpt.storage.run_folder import RunFolder
from fedgpt.update.downlink import Published

Observer = Callable[[str, dict[str, Any]], None]
RootTrainer = Callable[[Job], Update]
FAILURES = 10  # jobs for each update that a step needs, all failed: the run stops


class Server:
    """A run from its first version, or from a snapshot, to its last."""

    def __init__(
        self,
        options: RunOptions,
        strategy: Strategy,
        transport: Transport,
        evaluator: Evaluator,
        folder: RunFolder,
        snapshot: Snapshot,
        observers: Sequence[Observer] = (),
        root: RootTrainer | None = None,
        fleet: Fleet | None = None,
        journal: RecordedTransport | None = None,
        privacy: Privacy | None = None,
        scoring: Scoring = LANGUAGE,
    ):
        """`root` trains the server's own update; `fleet` slows clients down; `journal` is
        `transport`, if it is one.
        """
        self.options, self.scoring = options, scoring
        self.strategy = strategy
        self.transport = transport
        self.root = root
        self.fleet = fleet
        self.folder, self.observers, self.journal = folder, observers, journal
        self.state, self.tables = snapshot.state, snapshot.tables
        self.snapshot, self._saved = replace(snapshot, tables=snapshot.tables.frozen()), -1
        # an interrupted server saved between its usual checkpoints: what that one needs is kept,
        # too
        self.tables = self.tables.remembering()
        self.privacy = privacy or Privacy()
        self.pace = make_pace(
            options.pace, options.seed, self.tables.pacing or None, self.privacy.coins
        )
        self.checkpoints = Checkpoints(
            folder.checkpoints, options.checkpoint.keep, journal and journal.journal.drop
        )
        self.stage = BackgroundEvaluation(options.evaluate, evaluator, self._publish)
        self.clients: list[str] = []
        self._wall_began, self._earlier_wall = time.monotonic(), self.tables.wall_seconds
        self.published = Published(options.update.downlink, snapshot.extra)
        self.planner = JobPlanner(options, self.published, fleet, strategy.switches, self.privacy)
        self.switch = PacingAdvisor(strategy, self.planner, transport.at_once)
        self.diagnostics = Diagnostics(self.state.params.size, snapshot.extra)
        self.quarantine = Quarantine(options.validate, self.tables.strikes, self.tables.quarantine)
        self.best = BestWeights(options, self.checkpoints, snapshot, scoring.score)
        self.flight = InFlight()
        self.collector = UpdateCollector(options, strategy, self.state.params.size, self.privacy)
        self._arrived, self._failures = deque[Reply](), 0  # failures in a row

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Train to the last version; returns the summary that summary.json holds."""
        try:
            self._open()
            while self._part(self.state.version, self.tables.tokens_done) < 1:
                if (
                    self.pace.due(self._progress())
                    or len(self.collector) >= self.collector.max_updates
                ):
                    self._advance()
                    continue
                self._start_jobs()  # after the step: who is done gets the newest model
                progress = self._progress()
                if not self.pace.due(progress) and (reply := self._next_reply(progress)):
                    self._receive(reply)
            self._end(over=True)
            wall, records = self._wall_seconds(), self.folder.metrics.read()
            return summary(
                records, self.state, self.tables, wall, self.transport.virtual, self.scoring
            )
        except (KeyboardInterrupt, StoppedEarly) as stop:
            self._end(over=isinstance(stop, StoppedEarly))
            raise (
                Interrupted(str(self.folder.path)) if isinstance(stop, KeyboardInterrupt) else stop
            ) from None
        except (FedGPTError, OSError):  # a full disk, say
            self.checkpoints.ended()  # stopped with a message is not crashed
            raise
        finally:
            self.stage.close()
            self.checkpoints.close()
            self.transport.close()

    def _part(self, version: int, tokens: int) -> float:
        """How much of the run is done, from 0 to 1: in tokens, where `tokens` says or the pacing
        may change.
        """
        if self.options.tokens or self.strategy.switches:
            return min(1.0, tokens / self.planner.tokens_total(self.pace.pacing(len(self.clients))))
        return version / self.options.rounds

    def _open(self) -> None:
        """Meet the clients, then publish the starting version: version 0, or the one that a
        checkpoint left open.
        """
        self.checkpoints.started(self.state.version)
        if self.options.checkpoint.every != 0:
            self._save()
        self.stage.finish(dict(self.tables.record), self.state.params, **self.tables.evaluation)
        infos = self.transport.clients(timeout=300)
        self.clients = [info.id for info in infos]
        if not self.clients:
            raise StoppedEarly("no client appeared within 300 s")
        pacing = self.pace.pacing(len(self.clients))  # pace.clients=0 is a number only now
        if problems := list(self.strategy.problems(pacing)):
            raise ConfigError(problems)
        self.privacy.meet(infos)
        about = {"version": self.state.version, "tokens_total": self.planner.tokens_total(pacing)}
        self._tell("open", clients=[asdict(info) for info in infos], **about)
        if self.fleet is not None:
            self.fleet.meet(self.clients)
        restored = self.planner.restored(self.tables, self.snapshot.extra, self.state.params)
        self.flight.add(restored)
        self.transport.send(restored)
        self._begin_version()

    def _begin_version(self) -> None:
        """Forget the last version's counts and freeze what its updates are measured against."""
        self._asked = False
        self._failed = 0
        self._at_goal = None
        self._version_began = self.transport.now()
        # as clients get it
        self._start = replace(self.state, params=self.published.advance(self.state))
        max_updates = self.pace.max_updates(len(self.clients)) + len(self.flight)
        self.collector.begin(self.state, self.tables.norms, max_updates, self.planner.job_tokens)
        for client in self.quarantine.release(self.state.version):
            self._tell("release", client=client, version=self.state.version)

    def _progress(self) -> Progress:
        now = self.transport.now()
        return Progress(
            self.state.version,
            self.tables.dispatched,
            self._asked,
            len(self.flight),
            len(self.collector),
            now - self._version_began,
            None if self._at_goal is None else now - self._at_goal,
        )

    # ---- out

    def _start_jobs(self) -> None:
        roster = Roster(
            self.clients, self.flight.busy, lambda c: self._allowed(c) and self.transport.there(c)
        )
        chosen = self.pace.start(self._progress(), roster)
        if not chosen and not len(self.flight) and not any(map(self._allowed, self.clients)):
            raise StoppedEarly(
                f"no client may be asked: {self.quarantine.told(self.clients)}{self.privacy.told}"
            )
        if chosen is None:
            return
        if not self._asked:
            self._asked, self._version_began = True, self.transport.now()
        self._count(dispatched=len(chosen))
        about = (self.tables, self.pace.pacing(len(self.clients)), self.strategy.client_numbers())
        known = (*about, self.transport.now(), self.snapshot.tables.accepted)
        self._send([self.planner.job(client, self._start, *known) for client in chosen])

    def _allowed(self, client: str) -> bool:
        return not self.quarantine.holds(client) and self.privacy.may_ask(
            client, self.state.version, self.tables
        )

    def _send(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        self.flight.add(jobs)
        for job in jobs:
            self._count(bytes_down=self.transport.bytes_down(job))
            self._tell(
                "dispatch",
                client=job.client,
                number=job.number,
                version=job.version,
                steps=job.plan.local_steps,
            )
        self.transport.send(jobs)

    # ---- in

    def _next_reply(self, progress: Progress) -> Reply | None:
        """One reply; None where the pacing's patience, or that with a single job, is over."""
        if not self._arrived:
            waits = [
                self.pace.patience(progress),
                None if self.pace.keeps_jobs else self.switch.patience,
            ]
            deadline = self.options.pace.deadline if self.pace.keeps_jobs else None
            if deadline is not None and (oldest := self.flight.oldest()):
                waits.append(left := oldest.sent + deadline - self.transport.now())
                if left <= 0:
                    self._give_up(
                        [(oldest.client, oldest.number)],
                        f"no reply within pace.deadline={deadline:g} s",
                        True,
                    )
                    return None
            self._arrived.extend(
                self.transport.receive(min((s for s in waits if s is not None), default=None))
            )
            if not self._arrived:
                self._choose_pacing({})
        return self._arrived.popleft() if self._arrived else None

    def _give_up(self, keys: list[tuple[str, int]], why: str, missed: bool) -> None:
        """Wait for these jobs no longer; `missed`: their clients had the time."""
        for key in keys:
            job = self.flight.pop(*key)
            if missed and job is not None:  # at least as slow as this
                self.planner.measure(job, self.transport.now(), self.tables.speeds)
            self._reject("no_reply", client=key[0], number=key[1], detail=why)
            self._fail(key[0] if missed else None)
        self.transport.abandon(keys)

    def _receive(self, reply: Reply) -> None:
        """Validate one reply; a rejected one changes nothing but its counters."""
        key = (reply.client, reply.number)
        self._count(bytes_up=reply.bytes)
        job = self.flight.pop(*key)
        # what it had may be gone: the whole model, then
        if job is not None and reply.error and job.plan.cached_version >= 0:
            self._send(
                [
                    replace(
                        job,
                        plan=replace(job.plan, cached_version=-1),
                        model_deltas=(),
                        sent=self.transport.now(),
                    )
                ]
            )
            return
        try:
            if job is None:
                raise UpdateRejected(self.tables.stray(*key), "not in flight")
            update = self.collector.read(
                reply, job, self.tables.run, job.plan.local_steps * self.planner.step_tokens
            )
            self._accept(update, job, reply.seconds)
            self._choose_pacing({})
        except UpdateRejected as rejection:
            self._reject(
                rejection.code, client=reply.client, number=reply.number, detail=rejection.detail
            )
            if job is not None:
                self._fail(None if rejection.code == "stale" else reply.client)

    def _accept(self, update: Update, job: Job, seconds: float | None) -> None:
        staleness = self.state.version - update.version
        limit = self.options.pace.max_staleness
        if limit is not None and staleness > limit:
            raise UpdateRejected("stale", f"{staleness} versions old, pace.max_staleness={limit}")
        update = self.collector.add(update, job, staleness)
        took = self.planner.measure(job, self.transport.now(), self.tables.speeds, seconds)
        if not self.privacy.sums:  # what is measured of single updates is not noised
            self.diagnostics.update(update, self.pace.keeps_jobs)
        self.privacy.answered(update, self.tables)
        self.quarantine.clear(update.client)
        self._failures = 0
        self.tables.accepted[update.client] = update.number
        self.tables.held[update.client] = update.version
        self.tables.credit(update.client, update.tokens, took)
        if len(self.collector) == (self.options.pace.goal or 1):
            self._at_goal = self.transport.now()
        self._tell(
            "accept",
            client=update.client,
            number=update.number,
            version=update.version,
            tokens=update.tokens,
            staleness=staleness,
            train_seconds=took,
            measured=seconds in (None, took),
        )
        reach("accepted")

    def _fail(self, client: str | None) -> None:
        """Count a job that brought nothing, against its client where it is to blame; stop where
        nothing else comes.
        """
        self._failed, self._failures = self._failed + 1, self._failures + 1
        pacing = self.pace.pacing(len(self.clients))
        if client is not None:
            until = self.quarantine.strike(
                client, self.state.version, versions_per_round(pacing), self.clients
            )
            if until is not None:
                self._tell("quarantine", client=client, until=until, version=self.state.version)
        if self._failures >= FAILURES * max(pacing.clients, pacing.goal):
            raise StoppedEarly(f"{self._failures} jobs in a row failed: {self._reasons()}")

    def _reject(self, code: str, **about: Any) -> None:
        self.collector.rejections[code] += 1
        self.tables.rejected[code] = self.tables.rejected.get(code, 0) + 1
        self._tell("reject", code=code, **about)

    # ---- the server step

    def _advance(self) -> None:
        if not self.pace.keeps_jobs:
            enough = self._at_goal is not None and self.options.pace.goal is not None
            self._give_up(self.flight.keys(), "the version closed first", missed=not enough)
        accepted = len(self.collector)
        # how many came must not show
        minimum = 0 if self.privacy.sums else self.options.pace.minimum
        if not self.pace.keeps_jobs and self._failed and accepted < minimum:
            raise StoppedEarly(
                f"version {self.state.version + 1} got {accepted} valid updates of {accepted + self._failed} jobs, "
                f"pace.minimum={minimum}: {self._reasons()}"
            )
        reach("aggregate")
        before = self.state
        self.state = self.collector.step(
            before, self.pace.pacing(len(self.clients)), self._root(), self.tables
        )
        model_length(self.state)  # a run that has diverged ends here
        self._tally(before)
        self._choose_pacing(self.tables.record)
        if self.options.evaluate.rollback is not None:
            self._keep_or_restore()
        # before the snapshot: a restart cuts the events after it
        self._tell("version", **self.tables.record)
        every = self._cadence(self.options.checkpoint.every)
        keep = bool(every and self.state.version % every == 0)
        self._take_snapshot(keep)
        if keep:
            self.stage.wait()  # a checkpoint never runs ahead of metrics.jsonl
            self._save()
        self.stage.finish(dict(self.tables.record), self.state.params, **self.tables.evaluation)
        self._begin_version()

    def _root(self) -> Callable[[], Update] | None:
        """Trains the server's own update of this version, where the rule wants one."""
        if not self.strategy.needs_root:
            return None
        assert self.root is not None, "a rule that needs a root update is given its trainer"
        self.stage.wait()  # both compute on the server's device: one at a time
        pacing = self.pace.pacing(len(self.clients))
        every = self._cadence(self.options.checkpoint.every)
        return partial(self.root, self.planner.root_job(self.state, self.tables, pacing, every))

    def _keep_or_restore(self) -> None:
        """Score the new version now, as it decides; go back to the best weights where it is worse
        than allowed.
        """
        if self.tables.evaluation["score"]:
            record = {
                **self.tables.record,
                **self.stage.scores(self.state, **self.tables.evaluation),
            }
            self.state, told = self.best.decide(
                self.state, record[self.scoring.score.name]
            )
            done = {"score": False, "sample": False}
            self.tables = replace(self.tables, record={**record, **told}, evaluation=done)

    def _choose_pacing(self, record: dict[str, Any]) -> None:
        """Ask a strategy that may change the pacing; `record` is that of a new version, or empty
        within one.
        """
        if not self.strategy.switches or (self.pace.keeps_jobs and not record):
            return
        pacing = self.tables.pacing or self.options.pace.name
        done = {u.client for u in self.collector.accepted}
        choice = self.switch.ask(
            pacing, done, self.flight, self.tables, self.state, record, self.transport.now()
        )
        if choice.memory:
            self.state = replace(self.state, memory={**self.state.memory, **choice.memory})
        if choice.pacing != pacing:
            self.tables = replace(self.tables, pacing=choice.pacing)
            self.pace = make_pace(
                self.options.pace, self.options.seed, choice.pacing, self.privacy.coins
            )
            self._tell(
                "pacing", pacing=choice.pacing, reason=choice.reason, version=self.state.version
            )

    def _tally(self, before: ServerState) -> None:
        """Bring the ledgers to the new version and open its record."""
        accepted = self.collector.accepted
        trained = self.privacy.tokens(
            accepted, self.pace.pacing(len(self.clients)), self.planner.job_tokens
        )
        part = self._part(before.version, self.tables.tokens_done)
        self._count(tokens_done=trained)
        now = self._part(self.state.version, self.tables.tokens_done)
        seconds, wall = self.transport.now(), self._wall_seconds()
        evaluation = self.stage.plan(
            self.state.version, part, now, self._cadence(self.options.evaluate.every)
        )
        norms = () if self.privacy.sums else remembered(self.tables.norms, accepted)
        self.tables = replace(
            self.tables, seconds=seconds, wall_seconds=wall, evaluation=evaluation, norms=norms
        )
        record = {
            **line_of_version(
                self.state.version, self.tables, self.collector, self.flight, self.transport.virtual
            ),
            **(self.privacy.record(self.tables) if evaluation["score"] else {}),
            **self.diagnostics.step(before.params - self.state.params),
            "pacing": self.tables.pacing or self.options.pace.name,
        }
        self.tables = replace(self.tables, record=record)

    # ---- what survives

    def _take_snapshot(self, keep: bool) -> None:
        """Freeze state and tables as they are between two versions; jobs sent later do not change
        it.
        """
        if keep:  # one table more than checkpoints: the newest may still be on its way to the disk
            self.tables = self.tables.remembering(self.options.checkpoint.keep + 1)
        frozen = self.tables.frozen(unsaved=self.strategy.unsaved, in_flight=self.flight.as_json())
        bases = {f"base/{version}": base for version, base in self.flight.bases.items()}
        self.snapshot = Snapshot(
            self.state,
            frozen,
            {**bases, **self.diagnostics.memory(), **self.best.memory(), **self.published.memory()},
        )
        if self.journal is not None:
            self.journal.step(self.state.version)

    def _save(self) -> None:
        if self._saved != self.snapshot.state.version:
            self._saved = self.snapshot.state.version
            self.checkpoints.save(self.snapshot)

    def _publish(self, record: dict[str, Any], params: np.ndarray | None) -> None:
        """A version's finished record, with its weights where they were scored; called by the
        evaluation thread.
        """
        self.best.keep(record, params)
        self.folder.metrics.append(record)
        reach("evaluated")
        for observer in self.observers:
            observer("record", record)

    def _end(self, over: bool) -> None:
        """The server stops by its own will; `over`: told the same again, it would stop again."""
        self.stage.wait()
        self._save()
        self.checkpoints.wait()
        self.checkpoints.ended()
        if over and self.journal is not None:
            self.journal.over()

    # ---- small helpers

    def _wall_seconds(self) -> float:
        return self._earlier_wall + time.monotonic() - self._wall_began

    def _reasons(self) -> str:
        return f"{counted(self.collector.rejections)}; see events.jsonl in {self.folder.path}"

    def _cadence(self, every: int | None) -> int:
        """Versions between evaluations or checkpoints; by default those that take as many updates
        as a round.
        """
        return versions_per_round(self.pace.pacing(len(self.clients))) if every is None else every

    def _count(self, **more: int) -> None:
        self.tables = replace(
            self.tables, **{name: getattr(self.tables, name) + n for name, n in more.items()}
        )

    def _tell(self, event: str, **about: Any) -> None:
        about["seconds"] = self.transport.now()
        for observer in self.observers:
            observer(event, about)
