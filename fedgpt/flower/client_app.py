"""The ClientApp: calls client/work.py. The same app runs on every runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.policy import PolicyRefused
from fedgpt.client.work import ClientWork
from fedgpt.core.device import out_of_memory
from fedgpt.core.errors import ConfigError, FedGPTError, amount
from fedgpt.core.options import RunOptions
from fedgpt.flower.messages import info_content, read_job, refusal_content, update_content
from fedgpt.flower.run_config import options_of

app = ClientApp()


class ClientFailed(Exception):
    """An exception of the client, reported to the server by the name of its class only.

    The exception's message may contain text of the client or paths, so it is only in the client's
    log.
    """

    def __init__(self, error: Exception):
        super().__init__(f"{type(error).__name__} (the client's log has its message)")


class OutOfMemory(FedGPTError):
    """The memory of this machine or of its GPU is too small for a job."""

    def __init__(self, options: RunOptions):
        batch = f"local.batch_size={options.local.batch_size}"
        super().__init__(f"out of memory; lower {batch}, and raise local.accumulate instead")


# run config -> work of the latest run, so that data and buffers are reused for its next message
_works: dict[str, ClientWork] = {}


@app.query()
def query(message: Message, context: Context) -> Message:
    """Answer which client this node is, or why it cannot read the options of the run."""
    try:
        work, index = _work(context)
        with _reported(work):
            clients, digest = len(work.shards), work.prepared.digest
        _check_partition(context, clients)
    except ConfigError as error:
        return Message(refusal_content(error.problems), reply_to=message)
    return Message(info_content(work.info(index), digest), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one job."""
    work, index = _work(context)
    with _reported(work):
        header, delta = work.train(read_job(message), index)
    return Message(update_content(header, delta), reply_to=message)


@contextmanager
def _reported(work: ClientWork) -> Iterator[None]:
    """Raise an exception of the block as ClientFailed, if the server must not read its message."""
    try:
        yield
    except Exception as error:
        told = OutOfMemory(work.options) if out_of_memory(error) else error
        # a FedGPTError is meant for the user, but may quote a record or name a file
        meant = isinstance(told, FedGPTError) and work.options.privacy.unit == "none"
        if not meant and not isinstance(told, PolicyRefused):
            told = ClientFailed(told)
        if told is error:
            raise
        raise told from error


def _work(context: Context) -> tuple[ClientWork, int]:
    """The work of the run in this process, and the number of the node's partition."""
    key = repr(sorted(context.run_config.items()))
    if key not in _works:
        options = options_of(context.run_config)
        state = context.node_config.get("state-dir") or os.environ.get("FEDGPT_STATE_DIR")
        root = Path(str(state)) if state else Path(options.cache_dir) / "clients"
        _works.clear()
        _works[key] = ClientWork(options, str(root))
    return _works[key], _number(context, "partition-id")


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
