"""Connects the parts of a run: text, model, strategy, transport, evaluation, loop, report.

This file does not depend on Flower: flower/serve.py and tests pass a `Network`. All checks that can
refuse a run come before its configuration is written to its folder.
"""

from __future__ import annotations

import json
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgpt import __version__
from fedgpt.aggregate.base import Strategy
from fedgpt.client.work import ClientWork
from fedgpt.config.clients import client_problems
from fedgpt.config.compose import (
    build_strategy,
    changed_options,
    flat_options,
    refuse_another_run,
    to_yaml,
    with_length,
)
from fedgpt.core.errors import FULL, ConfigError, Unwritten, amount
from fedgpt.core.files import write_text
from fedgpt.core.flat import base_digest, flatten
from fedgpt.core.messages import ClientInfo, ServerState
from fedgpt.core.notices import saying
from fedgpt.core.options import RunOptions
from fedgpt.core.resources import Resources, resources_for
from fedgpt.core.transport import Transport
from fedgpt.data.prepare import Prepared
from fedgpt.data.shards import load_shards, say
from fedgpt.evaluate.central import CentralEvaluation
from fedgpt.model.build import build_model
from fedgpt.privacy.plan import PrivacyPlan, make_plan
from fedgpt.privacy.statement import statement
from fedgpt.report.progress import ProgressDisplay
from fedgpt.report.results import write_results
from fedgpt.report.run_report import longer_text, opening, privacy_text, summary_text
from fedgpt.report.trackers import make_trackers
from fedgpt.server.loop import Server, meeting_seconds
from fedgpt.server.metrics_line import first_line
from fedgpt.server.parts import Parts
from fedgpt.server.privacy import make_privacy
from fedgpt.simulate.fleet import Fleet
from fedgpt.simulate.virtual_clock import VirtualTransport, make_timing
from fedgpt.storage.checkpoint import Snapshot
from fedgpt.storage.initial_weights import base_weights, initial_weights
from fedgpt.storage.journal import Journal, RecordedTransport, needs_journal
from fedgpt.storage.resume import check_options, checked_content, open_or_resume
from fedgpt.storage.run_folder import RunFolder, keep_tokenizer
from fedgpt.storage.tables import Clients, RunIdentity
from fedgpt.tasks.base import make_task


@dataclass(frozen=True)
class RunText:
    """What the server knows of the text of a run."""

    prepared: Prepared  # the text of all clients, or the server's own
    # those of the partition; with corpus=site those of a run that goes on
    clients: Sequence[ClientInfo]
    # the frozen weights, which sites may need; empty if all parameters are trained
    base: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """The network between the server and its clients."""

    # (what the server knows of the text, seconds on the run's clock) -> a transport
    connect: Callable[[RunText, float], Transport]
    # makes a Strategy of an object of another framework
    adapt: Callable[[Any], Strategy]
    versions: Mapping[str, str]  # versions of libraries, on which bit-identity depends
    # whether clients have their own machines: the server then keeps a journal of their replies, so
    # that no work is repeated
    real_clients: bool
    # (the finished model's folder, id of the run) -> who has got it, in words
    deliver: Callable[[Path, str], str] | None = None


@dataclass(frozen=True)
class Setting:
    """The parts of a run that are computed before its folder is read."""

    options: RunOptions
    folder: RunFolder
    text: RunText
    resources: Resources
    environment: Mapping[str, Any]
    plan: PrivacyPlan | None
    statement: dict[str, Any]  # the statement of a private run
    transport: Transport | None  # where it was needed to learn who the clients are

    @property
    def prepared(self) -> Prepared:
        """The prepared text."""
        return self.text.prepared

    @property
    def base(self) -> Mapping[str, torch.Tensor]:
        """The frozen weights; empty if all parameters are trained."""
        return self.text.base


def serve(options: RunOptions, network: Network) -> dict[str, Any]:
    """Run `options` to the last version, or continue from the folder's checkpoint; the summary.

    Raises FedGPTError for failures that a user can act on.
    """
    try:
        with RunFolder(options.run_dir) as folder:
            refuse_another_run(options)
            with ExitStack() as closing:
                return _serve(_setting(options, folder, network, closing), network)
    except OSError as error:
        folder, path = Path(options.run_dir), Path(str(error.filename)).absolute()
        if error.errno not in FULL and not {folder.absolute(), folder.resolve()} & {*path.parents}:
            raise
        raise Unwritten(str(error.filename or "a file"), folder, error) from error


def _serve(setting: Setting, network: Network) -> dict[str, Any]:
    options, folder = setting.options, setting.folder
    with saying("preparing the evaluation"):
        strategy, evaluation = _strategy(setting, network), _evaluation(setting)
    names = evaluation.scoring.names
    snapshot = _snapshot(setting, names)
    resumed_at = snapshot.state.version
    trackers = make_trackers(options, folder.path, resumed_at, names)
    _claim(setting)  # after all checks that can refuse the run
    switches, pacing = strategy.switches, snapshot.totals.pacing or None
    score = evaluation.scoring.score.name
    display = ProgressDisplay(options, switches=switches, pacing=pacing, score=score)
    if longer := longer_text(snapshot.identity.options, options):
        display.say(longer)
    snapshot = _with_length(snapshot, options)
    display.say(_opening(setting, snapshot, evaluation.held_out.tokens))
    if setting.statement:
        display.say(privacy_text(setting.statement))
    # with these digests of the clients' text a guess of the text could be confirmed
    # and what the clients said of their own text is theirs
    kept_back = ("text", "shards", "clients")
    public = {name: value for name, value in setting.environment.items() if name not in kept_back}
    environment = json.dumps(public, indent=2)
    write_text(folder.path / "environment.json", environment + "\n")
    parts = _parts(setting, network, strategy, evaluation, snapshot)
    with display:
        run = snapshot.identity.run
        server = Server(parts, snapshot, [display, *trackers])
        del snapshot  # so that the server can free the vectors in it
        summary = server.run()
    with saying("writing the results"):
        model = build_model(options.model, setting.prepared.tokenizer.vocab_size, setting.base)
        np.copyto(flatten(model)[1].numpy(), server.state.params)
        write_results(folder, options, setting.prepared, model, summary, setting.statement)
        text = summary_text(summary, folder.metrics.read(), folder.path)
    display.say(text)
    if network.deliver is not None:
        with saying("handing the model to the clients"):
            told = network.deliver(folder.path / "model", run)
        display.say(told)
    return summary


def _setting(
    options: RunOptions, folder: RunFolder, network: Network, closing: ExitStack
) -> Setting:
    """The parts that are computed first; `closing` closes a transport that is never used."""
    changed = partial(changed_options, options=options)
    before = check_options(options, changed)
    prepared, shards = load_shards(options, say)
    # before weights are read
    content: dict[str, Any] = {**checked_content(options, prepared, shards, changed)}
    with saying("reading the initial weights"):
        base = base_weights(options, prepared.tokenizer)
    if base:
        content["base"] = base_digest(base)
    clients = [ClientInfo(s.client, s.size) for s in shards]
    text, transport = RunText(prepared, clients, base), None
    if options.corpus.at_sites:
        text, transport = _sites(options, text, before, network)
        content |= {"clients": {client.id: client.tokens for client in text.clients}}
    if transport is not None:
        closing.callback(transport.close)
    clients = text.clients
    resources = resources_for(options, len(clients))
    torch.set_num_threads(resources.threads)
    plan = None
    if options.privacy.unit != "none":
        with saying("computing the noise"):
            plan = make_plan(options, [client.tokens for client in clients])
    promise = statement(options, plan, len(clients)) if plan else {}
    environment = {**environment_of(resources, network.versions), **content}
    about = (resources, environment, plan, promise, transport)
    return Setting(options, folder, text, *about)


def _sites(
    options: RunOptions, text: RunText, before: RunIdentity | None, network: Network
) -> tuple[RunText, Transport | None]:
    """The clients with which the run began, or now begins: then also how they are connected."""
    if before is not None:
        started = before.environment["clients"].items()
        return replace(text, clients=[ClientInfo(*client) for client in started]), None
    transport = network.connect(text, 0.0)
    with saying(f"waiting for {amount(options.pace.begin or 1, 'client')}"):
        clients = transport.clients(meeting_seconds(at_sites=True))
    return replace(text, clients=clients), transport


def environment_of(resources: Resources, versions: Mapping[str, str]) -> dict[str, Any]:
    """Versions and machine, on which bit-identity depends besides configuration and seed."""
    cuda = resources.compute.device == "cuda"
    return {
        "fedgpt": __version__,
        "torch": torch.__version__,
        **versions,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "device": resources.compute.device,
        "dtype": resources.compute.dtype,
        "threads": resources.threads,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _snapshot(setting: Setting, scores: Sequence[str]) -> Snapshot:
    """The run's newest usable checkpoint, or version 0."""
    options = setting.options

    def start() -> Snapshot:
        run, flat = secrets.token_hex(8), flat_options(options)
        identity = RunIdentity(run, setting.environment, flat, setting.statement)
        with saying("making the initial weights"):
            params = initial_weights(options, setting.prepared.tokenizer)
        clients = Clients()
        if options.corpus.at_sites:
            clients.join(setting.text.clients)
        line = first_line(options.evaluate.samples)
        return Snapshot(ServerState(params), identity, line, clients=clients)

    return open_or_resume(
        setting.folder,
        options,
        start,
        partial(changed_options, options=options),
        setting.environment,
        scores,
    )


def _with_length(snapshot: Snapshot, options: RunOptions) -> Snapshot:
    """The snapshot, whose next checkpoint has the length of the run as it is now."""
    identity = snapshot.identity
    identity = replace(identity, options=with_length(identity.options, options))
    return replace(snapshot, identity=identity)


def _strategy(setting: Setting, network: Network) -> Strategy:
    options = setting.options
    strategy = build_strategy(options.strategy, options.trusted_packages)
    if not isinstance(strategy, Strategy):
        strategy = network.adapt(strategy)
    names = [client.id for client in setting.text.clients]
    if problems := list(client_problems(options, strategy, setting.prepared, names)):
        raise ConfigError(problems)
    return strategy


def _evaluation(setting: Setting) -> CentralEvaluation:
    options, task = setting.options, make_task(setting.options)
    try:
        return CentralEvaluation(
            options, setting.prepared, task, setting.resources.compute, setting.base
        )
    except ValueError as error:  # a task raises it for held-out text that it cannot use
        arguments = "change task.arguments, or " if options.task._target_ else ""
        raise ConfigError(
            f"task={options.task.name}: {type(task).__name__} refused the held-out text ({error});"
            f" {arguments}raise corpus.held_out"
        ) from error


def _claim(setting: Setting) -> None:
    """Write the run's configuration into a new folder, and its tokenizer unless it has it."""
    folder = setting.folder.path
    keep_tokenizer(folder, setting.prepared.tokenizer)
    path = folder / "config.yaml"
    if not path.exists():
        write_text(path, to_yaml(setting.options))
        write_text(folder / "command.txt", shlex.join(sys.argv) + "\n")


def _opening(setting: Setting, snapshot: Snapshot, held_out_tokens: int) -> str:
    compute, workers = setting.resources.compute, setting.resources.workers_text
    words = f"{compute.device}, {compute.dtype} ({compute.reason}), {workers}"
    text = setting.text
    return opening(setting.options, text.prepared, text.clients, snapshot, words, held_out_tokens)


def _parts(
    setting: Setting,
    network: Network,
    strategy: Strategy,
    evaluation: CentralEvaluation,
    snapshot: Snapshot,
) -> Parts:
    options, folder = setting.options, setting.folder
    fresh = snapshot.state.version == 0
    digest = setting.prepared.digest
    slowed = options.clock == "real" and options.fleet.name != "none"
    return Parts(
        options,
        strategy,
        _transport(setting, network, strategy, snapshot),
        evaluation,
        folder,
        evaluation.scoring,
        privacy=make_privacy(options, setting.plan, folder.path, digest, fresh),
        root=ClientWork(options, str(folder.path / "clients")).train_root,
        fleet=Fleet(options.fleet, options.seed) if slowed else None,
    )


def _transport(
    setting: Setting, network: Network, strategy: Strategy, snapshot: Snapshot
) -> Transport:
    """The network's transport, wrapped in the virtual clock or the journal if the run has one."""
    options, now = setting.options, snapshot.totals.seconds
    joined = snapshot.clients.joined
    text = replace(setting.text, clients=joined) if joined else setting.text
    real = setting.transport or network.connect(text, now)
    if options.clock == "virtual":
        return VirtualTransport(real, make_timing(options), now)
    if needs_journal(options, strategy.switches, network.real_clients):
        journal = Journal(setting.folder.wal)
        return RecordedTransport(real, journal, snapshot.state.version, now)
    return real
