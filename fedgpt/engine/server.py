"""The server loop: one for every pacing. Choose, dispatch, collect, validate, advance, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.core.errors import ConfigError, Interrupted, StoppedEarly, UpdateRejected
from fedgpt.core.messages import Job, Observed, Reply, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.engine.checkpoint import Checkpoints, Snapshot
from fedgpt.engine.diagnostics import Diagnostics
from fedgpt.engine.fleet import Fleet
from fedgpt.engine.flight import InFlight
from fedgpt.engine.pace import Progress, Roster, make_pace, versions_per_round
from fedgpt.engine.planner import Planner
from fedgpt.engine.record import clients_record, counted, summary, updates_record
from fedgpt.engine.run_folder import RunFolder
from fedgpt.engine.stage import Evaluator, Stage
from fedgpt.engine.transport import Transport
from fedgpt.update.blockwise import bf16_rounded
from fedgpt.update.codec import Expected, decode
from fedgpt.update.compress import compressor_of

Observer = Callable[[str, dict[str, Any]], None]
RootTrainer = Callable[[Job], Update]
NORM_LIMIT = 10.0  # an update longer than this many times the global model is rejected
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
    ):
        """`root` trains the server's own update; `fleet` slows the clients of a real clock down."""
        self.options, self.strategy, self.transport, self.root, self.fleet = options, strategy, transport, root, fleet
        self.folder, self.observers = folder, observers
        self.state, self.ledgers = snapshot.state, snapshot.ledgers
        self.snapshot, self._saved = replace(snapshot, ledgers=snapshot.ledgers.frozen()), -1
        # an interrupted server saved between its usual checkpoints: what that one needs is kept, too
        self.ledgers = replace(self.ledgers, restorable=(*self.ledgers.restorable, dict(self.ledgers.accepted)))
        self._failures = 0  # in a row
        self.pace = make_pace(options.pace, options.seed, self.ledgers.pacing or None)
        self.checkpoints = Checkpoints(folder.checkpoints, options.checkpoint.keep)
        self.stage = Stage(options.evaluate, evaluator, self._publish)
        self.clients: list[str] = []
        self._began, self._wall_began = transport.now(), time.monotonic()
        self._earlier_seconds, self._earlier_wall = self.ledgers.seconds, self.ledgers.wall_seconds
        self.compressor = compressor_of(options.update)
        self.planner = Planner(options, fleet, strategy.switches)
        self.diagnostics = Diagnostics(self.state.params.size, snapshot.extra)
        self.flight = InFlight()
        self._arrived: deque[Reply] = deque()
        self._sum = ExactSum(self.state.params.size, bound=1.0, count=1)  # untouched memory, if no rule adds to it

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Train to the last version; returns the summary that summary.json holds."""
        try:
            self._open()
            while self._part(self.state.version, self.ledgers.tokens_done) < 1:
                if self.pace.due(self._progress()) or len(self._weights) >= self._most:
                    self._advance()
                    continue
                self._start_jobs()  # after the step: who is done gets the newest model
                progress = self._progress()
                if not self.pace.due(progress) and (reply := self._next_reply(progress)):
                    self._receive(reply)
            self.stage.wait()
            self._save()
            virtual = self._seconds() if self.transport.virtual else None
            return summary(self.folder.metrics.read(), self.state, self.ledgers, self._wall_seconds(), virtual)
        except (KeyboardInterrupt, StoppedEarly) as stop:
            self.stage.wait()
            self._save()
            raise Interrupted(str(self.folder.path)) if isinstance(stop, KeyboardInterrupt) else stop from None
        finally:
            self.stage.close()
            self.checkpoints.close()

    def _part(self, version: int, tokens: int) -> float:
        """How much of the run is done, from 0 to 1: in tokens, where `tokens` says or the pacing may change."""
        if self.options.tokens or self.strategy.switches:
            return min(1.0, tokens / self.planner.tokens_total(self.pace.pacing(len(self.clients))))
        return version / self.options.rounds

    def _open(self) -> None:
        """Meet the clients, then publish the starting version: version 0, or the one that a checkpoint left open."""
        if self.options.checkpoint.every != 0:
            self._save()
        self.stage.finish(dict(self.ledgers.record), self.state.params, **self.ledgers.evaluation)
        infos = self.transport.clients(timeout=300)
        self.clients = [info.id for info in infos]
        if not self.clients:
            raise StoppedEarly("no client appeared within 300 s")
        if problems := list(self.strategy.problems(self.pace.pacing(len(self.clients)))):
            raise ConfigError(problems)  # pace.clients=0 is a number only now
        self._tell("open", clients=[asdict(info) for info in infos], version=self.state.version)
        if self.fleet is not None:
            self.fleet.meet(self.clients)
        restored = [self._restored(about) for about in self.ledgers.in_flight]
        self.flight.add(restored)
        self._begin_version()
        self.transport.send(restored)

    def _begin_version(self) -> None:
        """Forget the last version's counts and freeze what its updates are measured against."""
        self._asked, self._failed, self._at_goal = False, 0, None
        self._weights: list[float] = []
        self._updates: list[Update] = []  # only rules that are not linear keep them
        self._accepted: list[Update] = []  # without their vectors
        self._rejections: Counter[str] = Counter()
        self._version_began = self.transport.now()
        self._start = self.state  # as clients get it
        if self.options.update.downlink == "bf16":
            self._start = replace(self.state, params=bf16_rounded(self.state.params))
        self.norm_limit = NORM_LIMIT * max(1.0, float(np.linalg.norm(self.state.params)))
        self._most = self.pace.most(len(self.clients)) + len(self.flight)
        if self.strategy.linear:
            whole = Update("", 0, self.state.version, self.state.params, self.planner.job_tokens)
            limits = (self.norm_limit, self._most, self.strategy.weight(whole, 0))  # no update can weigh more
            self._sum.reset(*limits)

    def _progress(self) -> Progress:
        now = self.transport.now()
        return Progress(
            self.state.version,
            self.ledgers.dispatched,
            self._asked,
            len(self.flight),
            len(self._weights),
            now - self._version_began,
            None if self._at_goal is None else now - self._at_goal,
        )

    # ---- out

    def _start_jobs(self) -> None:
        roster = Roster(self.clients, self.flight.busy, self.transport.there)
        chosen = self.pace.start(self._progress(), roster)
        if chosen is None:
            return
        if not self._asked:
            self._asked, self._version_began = True, self.transport.now()
        pacing, now = self.pace.pacing(len(self.clients)), self.transport.now()
        numbers, saved = self.strategy.client_numbers(), self.snapshot.ledgers.accepted
        self._count(dispatched=len(chosen))
        self._send([self.planner.job(c, self._start, self.ledgers, pacing, numbers, now, saved) for c in chosen])

    def _send(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        self.flight.add(jobs)
        for job in jobs:
            self._count(bytes_down=self.transport.bytes_down(job))
            steps = job.plan.steps
            self._tell("dispatch", client=job.client, task=job.task, version=job.version, steps=steps)
        self.transport.send(jobs)

    def _restored(self, about: dict[str, Any]) -> Job:
        base = self.snapshot.extra.get(f"base/{about['version']}", self.state.params)
        return self.planner.restored(about, base, about["sent"] if self.transport.virtual else self.transport.now())

    # ---- in

    def _next_reply(self, progress: Progress) -> Reply | None:
        """One reply; None where the pacing's patience, or that with a single job, is over."""
        if not self._arrived:
            patience, now = self.pace.patience(progress), self.transport.now()
            deadline = self.options.pace.deadline if self.pace.carries else None
            if deadline is not None and (oldest := self.flight.oldest()):
                left = oldest.sent + deadline - now
                if left <= 0:
                    self._give_up([(oldest.client, oldest.task)], f"no reply within pace.deadline={deadline:g} s")
                    return None
                patience = left if patience is None else min(patience, left)
            self._arrived.extend(self.transport.receive(patience))
        return self._arrived.popleft() if self._arrived else None

    def _give_up(self, keys: list[tuple[str, int]], why: str) -> None:
        for key in keys:
            self.flight.pop(*key)
            self._reject("no_reply", client=key[0], task=key[1], detail=why)
            self._fail()
        self.transport.abandon(keys)

    def _receive(self, reply: Reply) -> None:
        """Validate one reply; a rejected one changes nothing but its counter."""
        key = (reply.client, reply.task)
        self._count(bytes_up=reply.bytes)
        job = self.flight.pop(*key)
        try:
            if job is None:
                raise UpdateRejected(self.ledgers.stray(*key), "not in flight")
            tokens = job.plan.steps * self.planner.step_tokens
            expected = Expected(
                self.ledgers.run, reply.client, reply.task, job.version,
                self.state.params.size, tokens, self.norm_limit, self.compressor,
            )  # fmt: skip
            self._accept(decode(reply, expected), job, reply.seconds)
            if not self.pace.carries:
                self._choose_pacing({})
        except UpdateRejected as rejection:
            self._reject(rejection.code, client=reply.client, task=reply.task, detail=rejection.detail)
            if job is not None:
                self._fail()

    def _accept(self, update: Update, job: Job, seconds: float | None) -> None:
        staleness = self.state.version - update.version
        seconds = self.transport.now() - job.sent if seconds is None else seconds
        self.planner.measure(update.client, job.plan.steps, seconds, self.ledgers.speeds)
        most = self.options.pace.max_staleness
        if most is not None and staleness > most:
            raise UpdateRejected("stale", f"{staleness} versions old, pace.max_staleness={most}")
        weight = self.strategy.weight(update, staleness)
        if self.strategy.linear:
            try:
                self._sum.add(update.delta, weight)
            except OverflowError as error:  # one element above the norm's limit, which float32's norm let pass
                raise UpdateRejected("norm_limit", str(error)) from error
        else:
            self._updates.append(replace(update, base=job.params) if self.strategy.needs_base else update)
        self.diagnostics.update(update, self.pace.carries)
        self._failures = 0
        self._weights.append(weight)
        metrics = {**update.metrics, "staleness": staleness}
        self._accepted.append(replace(update, delta=np.empty(0, np.float32), metrics=metrics))
        self.ledgers.accepted[update.client] = update.task
        self.ledgers.credit(update.client, update.tokens, seconds)
        if len(self._weights) == (self.options.pace.goal or 1):
            self._at_goal = self.transport.now()
        self._tell(
            "accept", client=update.client, task=update.task, version=update.version, tokens=update.tokens,
            staleness=staleness, train_seconds=seconds,
        )  # fmt: skip

    def _fail(self) -> None:
        """Count a job that brought nothing; stop where nothing else comes."""
        self._failed, self._failures = self._failed + 1, self._failures + 1
        pacing = self.pace.pacing(len(self.clients))
        if self._failures >= FAILURES * max(pacing.clients, pacing.goal):
            raise StoppedEarly(f"{self._failures} jobs in a row failed: {self._reasons()}")

    def _reject(self, code: str, **about: Any) -> None:
        self._rejections[code] += 1
        self.ledgers.rejected[code] = self.ledgers.rejected.get(code, 0) + 1
        self._tell("reject", code=code, **about)

    # ---- the server step

    def _advance(self) -> None:
        if not self.pace.carries:
            self._give_up(self.flight.keys(), "the version closed first")
        accepted = len(self._weights)
        if not self.pace.carries and accepted + self._failed and accepted < self.options.pace.minimum:
            raise StoppedEarly(
                f"version {self.state.version + 1} got {accepted} valid updates of {accepted + self._failed} jobs, "
                f"pace.minimum={self.options.pace.minimum}: {self._reasons()}"
            )
        before = self.state
        self.state = self._stepped()
        if not np.isfinite(self.state.params).all():
            raise StoppedEarly(f"version {self.state.version} has NaN or Inf weights; lower strategy.eta or local.lr")
        self._tally(before)
        self._choose_pacing(self.ledgers.record)
        self._tell("version", **self.ledgers.record)  # before the snapshot: a restart cuts the events after it
        every = self._cadence(self.options.checkpoint.every)
        keep = bool(every and self.state.version % every == 0)
        self._take_snapshot(keep)
        if keep:
            self.stage.wait()  # a checkpoint never runs ahead of metrics.jsonl
            self._save()
        self.stage.finish(dict(self.ledgers.record), self.state.params, **self.ledgers.evaluation)
        self._begin_version()

    def _choose_pacing(self, record: dict[str, Any]) -> None:
        """Ask a strategy that may change the pacing; `record` is that of a new version, or empty within one."""
        if not self.strategy.switches:
            return
        done = {update.client for update in self._accepted}
        seconds = self.planner.job_seconds(done, self.flight, self.ledgers.speeds, self.transport.now())
        observed = Observed(self.ledgers.pacing or self.options.pace.name, seconds, record)
        choice = self.strategy.choose_pacing(observed, self.state)
        if choice.memory:
            self.state = replace(self.state, memory={**self.state.memory, **choice.memory})
        if choice.pacing != observed.pacing:
            self.ledgers = replace(self.ledgers, pacing=choice.pacing)
            self.pace = make_pace(self.options.pace, self.options.seed, choice.pacing)
            self._tell("pacing", pacing=choice.pacing, reason=choice.reason, version=self.state.version)

    def _stepped(self) -> ServerState:
        """The next state: D is the exact weighted sum over its divisor, or what a combining rule makes of it."""
        state = self.state
        if self.strategy.linear:
            pacing = self.pace.pacing(len(self.clients))
            divisor = self.strategy.divisor(self._weights, pacing) if self._weights else 1.0
            return self.strategy.step(self._sum.mean(divisor), state)
        updates = self._updates
        if not self.pace.carries:
            updates = sorted(updates, key=lambda update: (update.client, update.task))
        root = None
        if self.strategy.needs_root:
            assert self.root is not None, "a rule that needs a root update is given its trainer"
            every = self._cadence(self.options.checkpoint.every)
            root = self.root(self.planner.root_job(state, self.ledgers, self.pace.pacing(len(self.clients)), every))
        d = self.strategy.combine(updates, state, root)
        learned = self.strategy.remember(updates, state)
        return self.strategy.step(d, replace(state, memory={**state.memory, **learned}) if learned else state)

    def _tally(self, before: ServerState) -> None:
        """Bring the ledgers to the new version and open its record."""
        trained = sum(update.tokens for update in self._accepted)
        part = self._part(before.version, self.ledgers.tokens_done)
        self._count(tokens_done=trained)
        now = self._part(self.state.version, self.ledgers.tokens_done)
        seconds, wall = self._seconds(), self._wall_seconds()
        every = self._cadence(self.options.evaluate.every)
        evaluation = self.stage.plan(self.state.version, part, now, every)
        self.ledgers = replace(self.ledgers, seconds=seconds, wall_seconds=wall, evaluation=evaluation)
        step = before.params - self.state.params
        record = {
            "version": self.state.version,
            "tokens": self.ledgers.tokens_done,
            "wall_seconds": round(wall, 3),
            "virtual_seconds": round(seconds, 6) if self.transport.virtual else None,
            "bytes_up": self.ledgers.bytes_up,
            "bytes_down": self.ledgers.bytes_down,
            **updates_record(self._accepted, self._weights, self._rejections, self.flight),
            **clients_record(self._accepted, self.ledgers, seconds),
            "step_norm": float(np.linalg.norm(step)),
            **self.diagnostics.step(step),
        }
        self.ledgers = replace(self.ledgers, record=record)

    # ---- what survives

    def _take_snapshot(self, keep: bool) -> None:
        """Freeze state and tables as they are between two versions; jobs sent later do not change it."""
        if keep:  # one table more than checkpoints: the newest may still be on its way to the disk
            tables = (*self.ledgers.restorable, dict(self.ledgers.accepted))[-(self.options.checkpoint.keep + 1) :]
            self.ledgers = replace(self.ledgers, restorable=tables)
        frozen = self.ledgers.frozen(unsaved=self.strategy.unsaved, in_flight=self.flight.as_json())
        bases = {f"base/{version}": base for version, base in self.flight.bases.items()}
        self.snapshot = Snapshot(self.state, frozen, {**bases, **self.diagnostics.memory()})

    def _save(self) -> None:
        if self._saved != self.snapshot.state.version:
            self._saved = self.snapshot.state.version
            self.checkpoints.save(self.snapshot)

    def _publish(self, record: dict[str, Any]) -> None:
        """A version's finished record; called by the evaluation thread, in the order of versions."""
        self.folder.metrics.append(record)
        self._tell("record", **record)

    # ---- small helpers

    def _seconds(self) -> float:
        """The run's clock."""
        now = self.transport.now()
        return now if self.transport.virtual else self._earlier_seconds + (now - self._began)

    def _wall_seconds(self) -> float:
        return self._earlier_wall + time.monotonic() - self._wall_began

    def _reasons(self) -> str:
        return f"{counted(self._rejections)}; see events.jsonl in {self.folder.path}"

    def _cadence(self, every: int | None) -> int:
        """Versions between evaluations or checkpoints; by default those that take as many updates as a round."""
        return versions_per_round(self.pace.pacing(len(self.clients))) if every is None else every

    def _count(self, **more: int) -> None:
        self.ledgers = replace(self.ledgers, **{name: getattr(self.ledgers, name) + n for name, n in more.items()})

    def _tell(self, event: str, **about: Any) -> None:
        about["seconds"] = self._seconds()
        for observer in self.observers:
            observer(event, about)
