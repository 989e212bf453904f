"""The server loop: one for every pacing. Sample, dispatch, collect, validate, advance, evaluate, checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.core.errors import Interrupted, StoppedEarly, UpdateRejected
from fedgpt.core.messages import Job, Plan, Reply, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.engine.checkpoint import Checkpoints, Snapshot
from fedgpt.engine.pace import Pace, Progress
from fedgpt.engine.run_folder import RunFolder
from fedgpt.engine.stage import Evaluator, Stage
from fedgpt.engine.transport import Transport
from fedgpt.update.codec import Expected, decode

Observer = Callable[[str, dict[str, Any]], None]
NORM_LIMIT = 10.0  # an update longer than this many times the global model is rejected


class Server:
    """A run from its first version, or from a snapshot, to its last."""

    def __init__(
        self,
        options: RunOptions,
        strategy: Strategy,
        pace: Pace,
        transport: Transport,
        evaluator: Evaluator,
        folder: RunFolder,
        snapshot: Snapshot,
        observers: Sequence[Observer] = (),
    ):
        self.options, self.strategy, self.pace, self.transport = options, strategy, pace, transport
        self.folder, self.observers = folder, observers
        self.state, self.ledgers = snapshot.state, snapshot.ledgers
        self.snapshot, self._saved = snapshot, -1
        self.checkpoints = Checkpoints(folder.checkpoints, options.checkpoint.keep)
        self.stage = Stage(options.evaluate, options.rounds, evaluator, self._publish)
        self.clients: list[str] = []
        self._began = transport.now()
        self._earlier_seconds = self.ledgers.wall_seconds
        local, model = options.local, options.model
        self.job_tokens = local.steps * local.accumulate * local.batch_size * model.block_size
        self._sum: ExactSum | None = None

    # ---- the loop

    def run(self) -> dict[str, Any]:
        """Train to the last version; returns the summary that summary.json holds."""
        try:
            self._open()
            while self.state.version < self.options.rounds:
                self._dispatch(self.pace.start(self._progress(), self.clients))
                progress = self._progress()
                if self.pace.due(progress):
                    self._advance()
                    continue
                for reply in self.transport.receive(self.pace.patience(progress)):
                    self._receive(reply)
            self.stage.wait()
            self._save()
            return self._summarise()
        except KeyboardInterrupt:
            self._save()
            raise Interrupted(str(self.folder.path)) from None
        except StoppedEarly:
            self._save()
            raise
        finally:
            self.stage.close()
            self.checkpoints.close()

    def _open(self) -> None:
        """Meet the clients, then publish the starting version: version 0, or the one that a checkpoint left open."""
        if self.options.checkpoint.every:
            self._save()
        self.stage.finish(dict(self.ledgers.record), self.state.params)
        infos = self.transport.clients(timeout=300)
        self.clients = [info.id for info in infos]
        if not self.clients:
            raise StoppedEarly("no client appeared within 300 s")
        self._tell("open", clients=[asdict(info) for info in infos], version=self.state.version)
        self._begin_version()

    def _begin_version(self) -> None:
        """Forget the last version's jobs and freeze what its updates are measured against."""
        self._in_flight: dict[tuple[str, int], int] = {}  # (client, task) -> version
        self._started = self._failed = 0
        self._weights: list[float] = []
        self._updates: list[Update] = []  # only rules that are not linear keep them
        self._tokens, self._metrics, self._rejections = 0, [], Counter()
        self._version_began = self.transport.now()
        self.norm_limit = NORM_LIMIT * max(1.0, float(np.linalg.norm(self.state.params)))
        if self.strategy.linear:
            limits = (self.norm_limit, self.pace.most(len(self.clients)), self._full_weight())
            if self._sum is None:
                self._sum = ExactSum(self.state.params.size, *limits)
            else:
                self._sum.reset(*limits)

    def _full_weight(self) -> float:
        """The largest weight an update can have: that of a whole job that is not stale."""
        full = Update("", 0, self.state.version, self.state.params, self.job_tokens)
        return self.strategy.weight(full, 0)

    def _progress(self) -> Progress:
        seconds = self.transport.now() - self._version_began
        return Progress(self.state.version, self._started, len(self._weights), self._failed, seconds)

    # ---- out

    def _dispatch(self, clients: list[str]) -> None:
        if not clients:
            return
        jobs = [self._job(client, len(clients)) for client in clients]
        for job in jobs:
            self._in_flight[job.client, job.task] = job.version
            self._count(bytes_down=self.transport.bytes_down(job))
            self._tell("dispatch", client=job.client, task=job.task, version=job.version)
        self._started += len(jobs)
        self.transport.send(jobs)

    def _job(self, client: str, together: int) -> Job:
        o, ledgers = self.options, self.ledgers
        task = ledgers.next_task.get(client, 0)
        ledgers.next_task[client] = task + 1
        step_tokens = self.job_tokens // o.local.steps
        expected = o.pace.rate * len(self.clients) if o.pace.rate is not None else self.pace.most(len(self.clients))
        accepted = ledgers.accepted.get(client, -1)
        restorable = {table[client] for table in ledgers.restorable if client in table}
        plan = Plan(
            run=ledgers.run,
            steps=o.local.steps,
            tokens_done=ledgers.tokens_done,
            tokens_per_step=step_tokens * together,
            tokens_total=max(1, round(o.rounds * expected * self.job_tokens)),
            numbers=self.strategy.client_numbers(),
            state=accepted,
            keep=tuple(sorted({accepted, *restorable} - {-1})),
        )
        return Job(client, task, self.state.version, self.state.params, plan)

    # ---- in

    def _receive(self, reply: Reply) -> None:
        """Validate one reply; a rejected one changes nothing but its counter."""
        key = (reply.client, reply.task)
        self._count(bytes_up=reply.bytes)
        version = self._in_flight.pop(key, None)
        try:
            if version is None:
                raise UpdateRejected(self._stray(*key), "not in flight")
            expected = Expected(
                self.ledgers.run, reply.client, reply.task, version,
                self.state.params.size, self.job_tokens, self.norm_limit,
            )  # fmt: skip
            self._accept(decode(reply, expected))
        except UpdateRejected as rejection:
            self._failed += version is not None
            self._reject(rejection.code, client=reply.client, task=reply.task, detail=rejection.detail)

    def _stray(self, client: str, task: int) -> str:
        """Why a reply that nobody waits for is refused."""
        if task == self.ledgers.accepted.get(client):
            return "duplicate"
        return "late" if 0 <= task < self.ledgers.next_task.get(client, 0) else "unknown_task"

    def _accept(self, update: Update) -> None:
        staleness = self.state.version - update.version
        weight = self.strategy.weight(update, staleness)
        if self.strategy.linear:
            assert self._sum is not None, "the sum is made when a version begins"
            self._sum.add(update.delta, weight)
        else:
            self._updates.append(replace(update, base=self.state.params))
        self._weights.append(weight)
        self._tokens += update.tokens
        self._metrics.append({**update.metrics, "staleness": staleness})
        self.ledgers.accepted[update.client] = update.task
        self._tell("accept", client=update.client, task=update.task, version=update.version, tokens=update.tokens)

    def _reject(self, code: str, **about: Any) -> None:
        self._rejections[code] += 1
        self.ledgers.rejected[code] = self.ledgers.rejected.get(code, 0) + 1
        self._tell("reject", code=code, **about)

    # ---- the server step

    def _advance(self) -> None:
        for client, task in sorted(self._in_flight):  # the deadline or the goal closed the version without them
            self._reject("no_reply", client=client, task=task, detail="the version closed first")
        accepted = len(self._weights)
        if self._started and accepted < self.options.pace.minimum:
            reasons = ", ".join(f"{code} x{count}" for code, count in self._rejections.items())
            raise StoppedEarly(
                f"version {self.state.version + 1} got {accepted} valid updates of {self._started} jobs, "
                f"pace.minimum={self.options.pace.minimum}: {reasons}; see events.jsonl in {self.folder.path}"
            )
        before = self.state
        self.state = self.strategy.step(self._direction(), before)
        if not np.isfinite(self.state.params).all():
            raise StoppedEarly(f"version {self.state.version} has NaN or Inf weights; lower strategy.eta or local.lr")
        self.stage.wait()
        self._tally(before)
        every = self.options.checkpoint.every
        keep = bool(every and self.state.version % every == 0)
        self._take_snapshot(keep)
        if keep:
            self._save()
        self.stage.finish(dict(self.ledgers.record), self.state.params)
        self._tell("version", **self.ledgers.record)
        self._begin_version()

    def _direction(self) -> np.ndarray:
        """D of this version: the exact weighted sum over its divisor, or what a non-linear rule makes of it."""
        if not self.strategy.linear:
            return self.strategy.combine(sorted(self._updates, key=lambda u: (u.client, u.task)), self.state)
        assert self._sum is not None, "the sum is made when a version begins"
        divisor = self.strategy.divisor(self._weights, self.options.pace.name) if self._weights else 1.0
        return self._sum.mean(divisor)

    def _tally(self, before: ServerState) -> None:
        """Bring the ledgers to the new version and open its record."""
        self._count(tokens_done=self._tokens)
        self.ledgers = replace(self.ledgers, wall_seconds=self._seconds())
        staleness = Counter(int(m["staleness"]) for m in self._metrics)
        record = {
            "version": self.state.version,
            "tokens": self.ledgers.tokens_done,
            "wall_seconds": round(self.ledgers.wall_seconds, 3),
            "bytes_up": self.ledgers.bytes_up,
            "bytes_down": self.ledgers.bytes_down,
            "accepted": len(self._weights),
            "rejected": dict(self._rejections),
            "staleness": {str(tau): count for tau, count in sorted(staleness.items())},
            **{name: self._mean(name) for name in ("train_loss", "lr", "update_norm")},
            "step_norm": float(np.linalg.norm(before.params - self.state.params)),
            "state_lost": int(sum(m.get("state_lost", 0) for m in self._metrics)),
        }
        self.ledgers = replace(self.ledgers, record=record)

    def _mean(self, name: str) -> float | None:
        values = [m[name] for m in self._metrics if name in m]
        return math.fsum(values) / len(values) if values else None

    # ---- what survives

    def _take_snapshot(self, keep: bool) -> None:
        """Freeze state and tables as they are between two versions; jobs sent later do not change it."""
        if keep:  # one table more than checkpoints: the newest may still be on its way to the disk
            tables = (*self.ledgers.restorable, dict(self.ledgers.accepted))[-(self.options.checkpoint.keep + 1) :]
            self.ledgers = replace(self.ledgers, restorable=tables)
        frozen = replace(
            self.ledgers,
            unsaved=self.strategy.unsaved,
            next_task=dict(self.ledgers.next_task),
            accepted=dict(self.ledgers.accepted),
            rejected=dict(self.ledgers.rejected),
        )
        self.snapshot = Snapshot(self.state, frozen)

    def _save(self) -> None:
        if self._saved != self.snapshot.state.version:
            self._saved = self.snapshot.state.version
            self.checkpoints.save(self.snapshot)

    def _publish(self, record: dict[str, Any]) -> None:
        """A version's finished record; called by the evaluation thread, in the order of versions."""
        self.folder.metrics.append(record)
        self._tell("record", **record)

    def _summarise(self) -> dict[str, Any]:
        scored = [r for r in self.folder.metrics.read() if "loss" in r]
        score = [{k: r[k] for k in ("version", "loss", "perplexity", "bits_per_byte")} for r in scored]
        ledgers = self.ledgers
        return {
            "versions": self.state.version,
            "tokens": ledgers.tokens_done,
            "wall_seconds": round(self._seconds(), 3),
            "virtual_seconds": None,
            "bytes_up": ledgers.bytes_up,
            "bytes_down": ledgers.bytes_down,
            "initial": score[0],
            "final": score[-1],
            "best": min(score, key=lambda s: s["loss"]),
            "weights_sha256": hashlib.sha256(self.state.params.tobytes()).hexdigest(),
            "rejected": ledgers.rejected,
            "epsilon": None,
            "delta": None,
        }

    # ---- small helpers

    def _seconds(self) -> float:
        return self._earlier_seconds + self.transport.now() - self._began

    def _count(self, **more: int) -> None:
        self.ledgers = replace(self.ledgers, **{name: getattr(self.ledgers, name) + n for name, n in more.items()})

    def _tell(self, event: str, **about: Any) -> None:
        for observer in self.observers:
            observer(event, about)
