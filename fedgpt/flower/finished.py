"""The finished model: when a run of sites ends, each connected site gets its folder.

server   run_dir/model/ -> one message with its files -> every client that is connected
site     -> STATE/models/<name of the run>-<its id>-<server>/, complete or not there
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from filelock import FileLock
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedgpt.client.site import Site
from fedgpt.client.state import safe_name
from fedgpt.core.errors import FedGPTError, amount
from fedgpt.core.files import PRIVATE, sync
from fedgpt.core.lines import one_line
from fedgpt.flower.grid_transport import STOP_FILE
from fedgpt.flower.mailbox import mailbox_of
from fedgpt.flower.messages import MOST_REASON, values_of
from fedgpt.flower.pool.shared_memory import array_record
from fedgpt.flower.push import push

ACTION = "finished"  # of the query that brings the model
LOCK = ".models.lock"  # in the folder of a site's state
# what a folder may contain; a site writes no file with another name
FILES = frozenset(
    {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "SHA256SUMS"),
    }
)
# the server does not see how far a client has come: it waits as long as the model takes at this
# many bytes in a second, and at least and at most so many seconds
SLOWEST, LEAST_SECONDS, MOST_SECONDS = 100e3, 60.0, 600.0
LOG_SECONDS = 1.0  # of waiting, before the log says so
MOST_ANSWER = 1 << 16  # bytes of a client's confirmation
log = logging.getLogger(__name__)


def deliver(grid: Grid, nodes: Mapping[str, int], folder: Path, run: str) -> list[str]:
    """Send the model in a folder to clients (name -> node); the names of those that have it.

    A client that is offline, or does not confirm in time, goes without it: the next run waits.
    When a launcher asks the server to stop, no client is waited for any more: the run is complete.
    """
    arrays = {
        path.name: np.fromfile(path, np.uint8)
        for path in sorted(folder.iterdir())
        if path.name in FILES
    }
    content = RecordDict({"files": array_record(arrays), "run": ConfigRecord({"id": run})})
    mailbox, have = mailbox_of(grid), []
    try:
        online = set(grid.get_node_ids())
        there = {node: name for name, node in nodes.items() if node in online}
        messages = [Message(content, node, f"query.{ACTION}") for node in there]
        waiting = {
            message_id: there[message.metadata.dst_node_id]
            for message_id, message in zip(push(grid, messages), messages, strict=True)
            if message_id  # otherwise the client has just left
        }
        for message_id in waiting:
            mailbox.watch(message_id, MOST_ANSWER)
        began, told = time.monotonic(), False
        most = patience(sum(array.nbytes for array in arrays.values()))
        while waiting and (waited := time.monotonic() - began) < most and not _stopped():
            if waited > LOG_SECONDS and not told:
                told, them = True, amount(len(waiting), "client")
                log.warning("waiting for %s to take the finished model, %.0f s at most", them, most)
            for arrival in mailbox.take():
                name = waiting.pop(arrival.message_id)
                if isinstance(arrival.reply, Message) and not arrival.reply.has_error():
                    have.append(name)
            mailbox.wait(1.0)
    finally:
        mailbox.close()
    return sorted(have)


def patience(size: int) -> float:
    """Seconds after which no client is waited for any more that takes a model of `size` bytes.

    >>> patience(5_000_000), patience(20_000_000), patience(500_000_000)
    (60.0, 200.0, 600.0)
    """
    return min(max(LEAST_SECONDS, size / SLOWEST), MOST_SECONDS)


def _stopped() -> bool:
    return STOP_FILE in os.environ and Path(os.environ[STOP_FILE]).exists()


def keep(message: Message, site: Site, name: str) -> RecordDict:
    """Write the model in a message below the site's folder; returns the confirmation.

    `name`: of the run, as its options have it. Raises FedGPTError for files that no model has.
    """
    files, about = message.content["files"], message.content["run"]
    if not isinstance(files, ArrayRecord) or not isinstance(about, ConfigRecord):
        raise FedGPTError("the server's model has other records than this version of fedgpt reads")
    if wrong := sorted(set(files) - FILES):
        raise FedGPTError(f"the server's model has a file {wrong[0]!r:.60}, which no model has")
    called = safe_name(f"{name}-{about['id']}"[:MOST_REASON])
    # a server chooses the ids of its runs, and must not replace the model of another server
    of_server = f"-{site.of_server}" if site.server else ""
    folder = Path(site.state_dir) / "models" / (called + of_server)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        for file, array in files.items():
            values_of(array).tofile(made / file)
            sync(made / file)
        # clients of one machine share a state, and each of them gets the model
        with FileLock(Path(site.state_dir) / LOCK, mode=PRIVATE):
            if folder.exists():  # of another client, or of a server that sent it and was killed
                folder.rename(Path(temporary) / "old")
            made.rename(folder)
    log.warning("the run %s has ended; its model is in %s", one_line(name, MOST_REASON), folder)
    return RecordDict()
