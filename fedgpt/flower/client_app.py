"""The ClientApp: calls client/work.py. The same app runs on every runtime.

one text for all clients   node config: partition-id, num-partitions   a shard of the run's text
corpus=site                node config: name, text, ...                deploy/site_app.py
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.client.texts import CommonText
from fedgpt.client.work import ClientWork
from fedgpt.core.errors import ConfigError, amount
from fedgpt.core.messages import ClientInfo
from fedgpt.flower import base_delivery, finished
from fedgpt.flower.messages import info_content, read_job, refusal_content, update_content
from fedgpt.flower.reported import reported
from fedgpt.flower.run_config import options_of
from fedgpt.flower.site_config import site_of

app = ClientApp()


# run config -> work of the latest run, so that data and buffers are reused for its next message
_works: dict[str, ClientWork] = {}
_apps: dict[str, ClientApp] = {}  # site -> its app


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer which client this node is, or why it cannot take part in the run."""
    try:
        if (site := site_of(context.node_config)) is not None:
            return _app_of(site)(message, context)
        work = _work(context)
        texts = work.texts
        assert isinstance(texts, CommonText), "the other kind is a site's"
        with reported(work):
            clients, digest = len(texts.shards), texts.prepared.digest
        _check_partition(context, clients)
        shard = texts.shards[_number(context, "partition-id")]
    except ConfigError as error:
        return Message(refusal_content(error.problems), reply_to=message)
    content = info_content(ClientInfo(shard.client, shard.size), digest)
    return Message(content, reply_to=message)


@app.query(base_delivery.ACTION)
def base(message: Message, context: Context) -> Message:
    """Keep a piece of the run's base weights."""
    return _at_site(message, context)


@app.query(finished.ACTION)
def model(message: Message, context: Context) -> Message:
    """Keep the model of a run that has ended."""
    return _at_site(message, context)


def _at_site(message: Message, context: Context) -> Message:
    site = site_of(context.node_config)
    assert site is not None, "only sites are sent these"
    return _app_of(site)(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one job."""
    if (site := site_of(context.node_config)) is not None:
        return _app_of(site)(message, context)
    work = _work(context)
    with reported(work):
        header, delta = work.train(read_job(message), _number(context, "partition-id"))
    return Message(update_content(header, delta), reply_to=message)


def _app_of(site: Site) -> ClientApp:
    """The app of a site, which is made once: its owner set no policy for a SuperNode."""
    from fedgpt.flower.deploy.site_app import site_app  # for sites only

    key = repr(site)
    if key not in _apps:
        _apps.clear()
        _apps[key] = site_app(site, Policy())
    return _apps[key]


def _work(context: Context) -> ClientWork:
    """The work of the run in this process; raises ConfigError if its clients are sites."""
    key = repr(sorted(context.run_config.items()))
    if key not in _works:
        options = options_of(context.run_config)
        if options.corpus.at_sites:
            raise ConfigError(
                "corpus=site: each client has its own text; start the SuperNode with --node-config"
                ' \'name="NAME" text="FOLDER" state-dir="FOLDER"\', or use fedgpt client'
            )
        state = context.node_config.get("state-dir") or os.environ.get("FEDGPT_STATE_DIR")
        root = Path(str(state)) if state else Path(options.cache_dir) / "clients"
        _works.clear()
        _works[key] = ClientWork(options, str(root))
    return _works[key]


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
