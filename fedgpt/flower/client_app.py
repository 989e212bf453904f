"""The ClientApp: a thin caller of the engine's client work. The same app runs on the pool, on Ray
and on SuperNodes.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedgpt.client.work import ClientWork
from fedgpt.core.errors import FedGPTError
from fedgpt.flower.messages import info_content, read_job, update_content
from fedgpt.flower.run_config import options_of

app = ClientApp()


class ClientFailed(Exception):
    """What the server is told of an exception: its kind. Its words may hold text or paths: they
    stay in our own log.
    """


_works: dict[str, ClientWork] = {}  # one per run configuration: buffers and data outlive a message


@app.query()
def query(message: Message, context: Context) -> Message:
    """Say which client this node is."""
    work, index = _work(context)
    return Message(info_content(work.info(index), work.prepared.digest), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do one job."""
    work, index = _work(context)
    try:
        header, delta = work.train(read_job(message), index)
    except FedGPTError:  # its message is meant to be read
        raise
    except Exception as error:
        raise ClientFailed(type(error).__name__) from error
    return Message(update_content(header, delta), reply_to=message)


def _work(context: Context) -> tuple[ClientWork, int]:
    """This process' work for the run, and the partition that the node stands for."""
    key = repr(sorted(context.run_config.items()))
    if key not in _works:
        options = options_of(context.run_config)
        state = context.node_config.get("state-dir") or os.environ.get("FEDGPT_STATE_DIR")
        root = Path(str(state)) if state else Path(options.cache_dir) / "clients"
        _works.clear()
        _works[key] = ClientWork(options, str(root))
    return _works[key], int(str(context.node_config["partition-id"]))
