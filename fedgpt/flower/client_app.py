"""The ClientApp: calls client/work.py. The same app runs on every runtime.

one text for all clients   node config: partition-id, num-partitions   a shard of the run's text
corpus=site                node config: name, text, ...                the site's own text
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedgpt.client.site import Site
from fedgpt.client.texts import CommonText, SiteText
from fedgpt.client.work import ClientWork
from fedgpt.core.device import out_of_memory
from fedgpt.core.errors import ConfigError, FedGPTError, ForServer, amount
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import RunOptions
from fedgpt.flower.finished import ACTION, keep
from fedgpt.flower.messages import (
    info_content,
    read_job,
    read_question,
    refusal_content,
    update_content,
)
from fedgpt.flower.run_config import options_of
from fedgpt.flower.site_config import site_of

app = ClientApp()


class ClientFailed(Exception):
    """An exception of the client, reported to the server by the name of its class only.

    The exception's message may contain text of the client or paths, so it is only in the client's
    log.
    """

    def __init__(self, error: Exception):
        super().__init__(f"{type(error).__name__} (the client's log has its message)")


class OutOfMemory(ForServer):
    """The memory of this machine or of its GPU is too small for a job."""

    def __init__(self, options: RunOptions):
        batch = f"local.batch_size={options.local.batch_size}"
        super().__init__(f"out of memory; lower {batch}, and raise local.accumulate instead")


# run config and site -> work of the latest run, so that data and buffers are reused for its next
# message
_works: dict[str, ClientWork] = {}


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer which client this node is, or why it cannot take part in the run."""
    try:
        work = _work(context)
        if isinstance(work.texts, SiteText):
            with _reported(work):
                answer = _of_site(work.texts, work.options, read_question(message))
        else:
            answer = _of_common_text(work, context)
    except ConfigError as error:
        return Message(refusal_content(error.problems), reply_to=message)
    return Message(answer, reply_to=message)


@app.query(ACTION)
def finished(message: Message, context: Context) -> Message:
    """Keep the model of a run that has ended."""
    site = site_of(context.node_config)
    assert site is not None, "only sites are sent a model"
    return Message(keep(message, site, options_of(context.run_config).name), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one job."""
    work = _work(context)
    index = _number(context, "partition-id") if isinstance(work.texts, CommonText) else 0
    with _reported(work):
        header, delta = work.train(read_job(message), index)
    return Message(update_content(header, delta), reply_to=message)


def _of_site(texts: SiteText, options: RunOptions, tokenizer: str) -> RecordDict:
    """Who this site is and how much text it has; in a private run down to a power of two."""
    size = texts.introduce(tokenizer)
    if options.privacy.unit != "none":
        size = 1 << (size.bit_length() - 1)
    return info_content(ClientInfo(texts.site.name, size), texts.tokenizer.digest)


def _of_common_text(work: ClientWork, context: Context) -> RecordDict:
    """Which client this node is; raises ConfigError unless it is one of the run."""
    texts = work.texts
    assert isinstance(texts, CommonText), "the other kind is a site's"
    with _reported(work):
        clients, digest = len(texts.shards), texts.prepared.digest
    _check_partition(context, clients)
    shard = texts.shards[_number(context, "partition-id")]
    return info_content(ClientInfo(shard.client, shard.size), digest)


@contextmanager
def _reported(work: ClientWork) -> Iterator[None]:
    """Raise an exception of the block as ClientFailed, if the server must not read its message."""
    try:
        yield
    except Exception as error:
        told = OutOfMemory(work.options) if out_of_memory(error) else error
        # a FedGPTError is meant for the user, but may quote a record or name a file
        own = isinstance(work.texts, SiteText) or work.options.privacy.unit != "none"
        if not isinstance(told, ForServer if own else FedGPTError):
            told = ClientFailed(told)
        if told is error:
            raise
        raise told from error


def _work(context: Context) -> ClientWork:
    """The work of the run in this process; raises ConfigError if it is not for this node."""
    site = site_of(context.node_config)
    key = repr((sorted(context.run_config.items()), site))
    if key not in _works:
        options = options_of(context.run_config)
        _check_kind(options, site)
        _works.clear()
        if site is not None:
            _works[key] = ClientWork(site.options(options), site.runs, SiteText(site, options))
            return _works[key]
        state = context.node_config.get("state-dir") or os.environ.get("FEDGPT_STATE_DIR")
        root = Path(str(state)) if state else Path(options.cache_dir) / "clients"
        _works[key] = ClientWork(options, str(root))
    return _works[key]


def _check_kind(options: RunOptions, site: Site | None) -> None:
    """Raise ConfigError unless the run's clients have the kind of text that this node has."""
    if site is None and options.corpus.at_sites:
        raise ConfigError(
            "corpus=site: each client has its own text; start the SuperNode with --node-config"
            ' \'name="NAME" text="FOLDER" state-dir="FOLDER"\', or use fedgpt client'
        )
    if site is not None and not options.corpus.at_sites:
        raise ConfigError(
            f"corpus={options.corpus.name}: the server names the text of this run, and this site"
            " trains on its own text only; use corpus=site"
        )


def _check_partition(context: Context, clients: int) -> None:
    """Raise ConfigError unless the node's configuration names one of the run's clients."""
    index, count = _number(context, "partition-id"), _number(context, "num-partitions")
    problems = []
    if not 0 <= index < clients:
        problems.append(
            f"--node-config partition-id={index}: must be from 0 to {clients - 1}, as the run has"
            f" {amount(clients, 'client')}; start each SuperNode with another of these numbers"
        )
    if count != clients:
        problems.append(
            f"--node-config num-partitions={count}: the run has {amount(clients, 'client')}; start"
            f" every SuperNode with num-partitions={clients}, or change partition.clients"
        )
    if problems:
        raise ConfigError(problems)


def _number(context: Context, name: str) -> int:
    """A whole number in the node's configuration; raises ConfigError if it is missing or none."""
    value = context.node_config.get(name)
    try:
        return int(str(value))
    except ValueError:
        given = "is missing" if value is None else f"{value!r} is not a whole number"
        raise ConfigError(
            f"--node-config {name}: {given}; start the SuperNode with --node-config"
            " 'partition-id=0 num-partitions=2', for example"
        ) from None
