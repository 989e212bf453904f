"""One run on one Grid, put together: data, model, strategy, transport, evaluation, loop, report."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flwr
import numpy as np
import torch
from flwr.serverapp import Grid

from fedgpt import __version__
from fedgpt.aggregate.base import Strategy
from fedgpt.client.work import ClientWork
from fedgpt.config.compose import (
    build_strategy,
    changed_options,
    flat_options,
    refuse_another_run,
    to_yaml,
)
from fedgpt.core.errors import ConfigError, FedGPTError, Unwritten
from fedgpt.core.files import write_text
from fedgpt.core.flat import base_digest, flatten
from fedgpt.core.messages import ClientInfo, ServerState
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.core.transport import Transport
from fedgpt.data.corpora import corpus_prompt
from fedgpt.data.partition import Shard, partition
from fedgpt.data.prepare import Prepared, prepare
from fedgpt.evaluate.held_out import HeldOut
from fedgpt.flower.grid_transport import GridTransport
from fedgpt.flower.pool.grid import PoolGrid
from fedgpt.flower.pool.resources import Resources, resources_for
from fedgpt.flower.strategy_adapter import FlowerStrategy
from fedgpt.model.build import build_model
from fedgpt.model.hf import export_model
from fedgpt.privacy.plan import make_plan
from fedgpt.privacy.statement import statement
from fedgpt.report.diagnostics import timeline_figure, updates_figure
from fedgpt.report.figures import loss_figure
from fedgpt.report.model_card import model_card
from fedgpt.report.page import report_page
from fedgpt.report.progress import ProgressDisplay
from fedgpt.report.run_report import opening, privacy_text, samples_page, summary_text
from fedgpt.server.loop import Server
from fedgpt.server.metrics import first_record
from fedgpt.server.privacy import make_privacy
from fedgpt.simulate.fleet import Fleet, make_timing
from fedgpt.simulate.virtual_clock import VirtualTransport
from fedgpt.storage.checkpoint import Checkpoints, RunTables, Snapshot
from fedgpt.storage.initial_weights import base_weights, initial_weights
from fedgpt.storage.journal import Journal, RecordedTransport, needs_journal
from fedgpt.storage.run_folder import RunFolder

# seconds past the deadline before a client that hangs is given up (the pool ends its worker)
TTL_MARGIN = 10.0
# names a file by which a launcher in another process asks a server to stop
STOP_FILE = "FEDGPT_STOP_FILE"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # no more room for a file
log = logging.getLogger(__name__)


def serve(options: RunOptions, grid: Grid) -> dict[str, Any]:
    """Run `options` to the last version, or continue it from its folder's newest checkpoint;
    returns the summary.
    """
    try:
        with RunFolder(options.run_dir) as folder:
            refuse_another_run(options)
            prepared = prepare(options.corpus, options.tokenizer, options.cache_dir)
            shards = partition(
                prepared, options.partition, options.seed, options.model.block_size + 1
            )
            return _Run(options, folder, prepared, shards, grid).go()
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise Unwritten(str(error.filename or "a file"), Path(options.run_dir), error) from error


class _Run:
    """The parts of one run and the order they come in."""

    def __init__(
        self,
        options: RunOptions,
        folder: RunFolder,
        prepared: Prepared,
        shards: Sequence[Shard],
        grid: Grid,
    ):
        self.options = options
        self.folder = folder
        self.prepared = prepared
        self.shards = shards
        self.grid = grid
        self.resources = resources_for(options, len(shards))
        self.compute = self.resources.compute
        torch.set_num_threads(self.resources.threads)
        # the frozen weights of the run, none unless model.trainable leaves some out
        self.base = base_weights(options, prepared.tokenizer)
        self.environment = _environment(self.resources)
        if self.base:
            self.environment["base"] = base_digest(self.base)
        private = options.privacy.unit != "none"
        self.privacy_plan = (
            make_plan(options, [shard.size for shard in shards]) if private else None
        )
        self.statement = (
            statement(options, self.privacy_plan, len(shards)) if self.privacy_plan else {}
        )

    def go(self) -> dict[str, Any]:
        o = self.options
        snapshot = self._snapshot()
        stage = self._held_out()
        strategy = build_strategy(o.strategy, o.trusted_packages)
        if not isinstance(strategy, Strategy):
            strategy = FlowerStrategy(strategy)
        if strategy.needs_root and self.prepared.public().size <= o.model.block_size:
            raise ConfigError(
                f"corpus.public={o.corpus.public}: {self.prepared.public().size} tokens are public,"
                " and the server's own update needs more than"
                f" model.block_size={o.model.block_size}; raise it"
            )
        # nothing is wrong with it so far: what is refused leaves no run behind
        _claim(self.folder, o)
        display = ProgressDisplay(
            o, switches=strategy.switches, pacing=snapshot.tables.pacing or None
        )
        display.say(
            opening(
                o,
                self.prepared,
                self.shards,
                snapshot,
                self.compute,
                self.resources.workers_text,
                stage.tokens,
            )
        )
        if self.statement:
            display.say(privacy_text(self.statement))
        write_text(
            self.folder.path / "environment.json", json.dumps(self.environment, indent=2) + "\n"
        )
        fresh = snapshot.state.version == 0
        privacy = make_privacy(o, self.privacy_plan, self.folder.path, self.prepared.digest, fresh)
        transport = self._transport(
            snapshot, Journal(self.folder.wal) if needs_journal(o, strategy.switches) else None
        )
        with display:
            slowed = (
                Fleet(o.fleet, o.seed) if o.clock == "real" and o.fleet.name != "none" else None
            )
            server = Server(
                o,
                strategy,
                transport,
                self._evaluator(stage),
                self.folder,
                snapshot,
                (self._log_event, display),
                ClientWork(o, str(self.folder.path / "clients")).train_root,
                slowed,
                transport if isinstance(transport, RecordedTransport) else None,
                privacy,
            )
            del snapshot  # the server says how long the vectors in it are kept
            summary = server.run()
        self._finish(summary, server.state.params, display)
        return summary

    def _snapshot(self) -> Snapshot:
        """Where the run stands: its newest whole checkpoint, or version 0."""
        checkpoints = Checkpoints(self.folder.checkpoints, self.options.checkpoint.keep)
        snapshot = checkpoints.recover()
        checkpoints.close()
        if checkpoints.given_up is not None:  # the log leads to what came to nothing
            Journal(self.folder.wal).forget(checkpoints.given_up)
        if snapshot is None:
            for records in (self.folder.metrics, self.folder.events):
                records.keep([])
            Journal(self.folder.wal).clear()
            tables = RunTables(
                run=secrets.token_hex(8),
                record=first_record(),
                environment=self.environment,
                options=flat_options(self.options),
                privacy=self.statement,
            )
            return Snapshot(
                ServerState(initial_weights(self.options, self.prepared.tokenizer)), tables
            )
        if changed := changed_options(snapshot.tables.options, self.options):
            raise FedGPTError(
                f"{self.folder.path} cannot be continued: its config.yaml was changed after its"
                f" checkpoint was made ({changed}); change it back, or start again with another"
                " run_dir"
            )
        base_before = snapshot.tables.environment.get("base", "")
        if (base_now := self.environment.get("base", "")) != base_before:
            raise FedGPTError(
                f"{self.folder.path} cannot be continued: its base weights differ, as"
                f" init_from={self.options.init_from} has changed ({base_before[:16]} ->"
                f" {base_now[:16]}); restore that folder, or start again with another run_dir"
            )
        if snapshot.tables.unsaved:
            raise FedGPTError(
                f"{self.folder.path} cannot be continued: its strategy remembers"
                f" {', '.join(snapshot.tables.unsaved)}, which no checkpoint holds; start again"
                " with another run_dir"
            )
        version = snapshot.state.version
        self.folder.metrics.keep(r for r in self.folder.metrics.read() if r["version"] < version)
        self.folder.events.keep(_until(version, self.folder.events.read()))
        if differing := _differing(snapshot.tables.environment, self.environment):
            log.warning(
                "resuming under other conditions (%s): statistically equivalent, not bit-identical",
                differing,
            )
        return snapshot

    def _held_out(self) -> HeldOut:
        tokenizer, o = self.prepared.tokenizer, self.options
        return HeldOut(
            o.model,
            self.prepared.held_out(),
            tokenizer.token_bytes,
            self.compute,
            o.evaluate.tokens,
            self.base,
        )

    def _evaluator(self, stage: HeldOut) -> Any:
        o, tokenizer = self.options, self.prepared.tokenizer
        prompt = o.evaluate.prompt if o.evaluate.prompt is not None else corpus_prompt(o.corpus)
        ids = list(tokenizer.encode(prompt)) or [tokenizer.end]

        def evaluate(version: int, params: np.ndarray, sample: bool) -> dict[str, Any]:
            scores: dict[str, Any] = stage(params).as_dict()
            if sample:
                seed = derive_seed(o.seed, "sample", version)
                written = stage.sample(ids, o.evaluate.sample_tokens, seed, tokenizer.end)
                scores |= {"prompt": prompt, "sample": tokenizer.decode(written)}
            return scores

        return evaluate

    def _transport(self, snapshot: Snapshot, journal: Journal | None) -> Transport:
        """The pool knows its clients by partition; other runtimes are asked. Virtual clock or
        journal go around.
        """
        known = None
        if isinstance(self.grid, PoolGrid):
            infos = [ClientInfo(shard.client, shard.size) for shard in self.shards]
            known = dict(zip(self.grid.get_node_ids(), infos, strict=True))
        virtual, deadline = self.options.clock == "virtual", self.options.pace.deadline
        ttl = None if deadline is None or virtual else deadline + TTL_MARGIN
        now = snapshot.tables.seconds
        stop = Path(os.environ[STOP_FILE]) if STOP_FILE in os.environ else None
        real = GridTransport(
            self.grid, len(self.shards), self.prepared.digest, known, ttl, now, stop
        )
        if virtual:
            return VirtualTransport(real, make_timing(self.options), now)
        return (
            real
            if journal is None
            else RecordedTransport(real, journal, snapshot.state.version, now)
        )

    def _log_event(self, event: str, about: dict[str, Any]) -> None:
        if event in ("dispatch", "accept", "reject", "version", "pacing", "quarantine", "release"):
            self.folder.events.append({"event": event, **about})

    def _finish(
        self, summary: dict[str, Any], params: np.ndarray, display: ProgressDisplay
    ) -> None:
        """Everything a person or a script wants at the end: summary, model folder, samples,
        figures, one page.
        """
        path = self.folder.path
        records = self.folder.metrics.read()
        model = build_model(self.options.model, self.prepared.tokenizer.vocab_size, self.base)
        np.copyto(flatten(model)[1].numpy(), params)
        card = model_card(self.options, summary, self.statement)
        export_model(path / "model", model, self.prepared.folder, card)
        write_text(path / "samples.md", samples_page(records))
        loss_figure(records, path / "figures" / "loss.png")
        timeline_figure(self.folder.events.read(), path / "figures" / "timeline.png")
        updates_figure(records, path / "figures" / "updates.png")
        write_text(path / "report.html", report_page(summary, records, path))
        write_text(path / "summary.json", json.dumps(summary, indent=2) + "\n")
        display.say(summary_text(summary, records, path))


def _claim(folder: RunFolder, options: RunOptions) -> None:
    """Write the run's configuration into a new folder."""
    path = folder.path / "config.yaml"
    if not path.exists():
        write_text(path, to_yaml(options))
        write_text(folder.path / "command.txt", shlex.join(sys.argv) + "\n")


def _environment(resources: Resources) -> dict[str, Any]:
    """What bit-identity depends on, beside configuration and seed."""
    return {
        "fedgpt": __version__,
        "torch": torch.__version__,
        "flwr": flwr.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "device": resources.compute.device,
        "dtype": resources.compute.dtype,
        "threads": resources.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if resources.compute.device == "cuda" else None,
    }


def _until(version: int, events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """What had happened when `version` was made; what came after it will happen again."""
    ends = [
        i
        for i, event in enumerate(events)
        if event["event"] == "version" and event["version"] == version
    ]
    return events[: ends[-1] + 1] if ends else []


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = [k for k in now if before.get(k) != now[k]]
    return ", ".join(f"{k} {before.get(k)} -> {now[k]}" for k in keys)
