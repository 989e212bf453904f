"""A whole run in this process: Flower's apps over a Grid that calls the ClientApp itself. No
process is started.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.config import compose
from fedgpt.data.text import shards_of
from fedgpt.flower.client_app import app
from fedgpt.flower.pool.shared_memory import NdArray
from fedgpt.flower.serve import serve

FIRST_NODE = 1000


class HereGrid(Grid):
    """Every message is answered when it is pushed."""

    def __init__(self, clients: int, run_config: dict[str, Any], state: str):
        self.clients, self.run_config, self.state = clients, run_config, state
        self.replies: dict[str, Message] = {}
        self.set_run(Run.create_empty(run_id=1))
        TaskIdentity.task_id, TaskIdentity.node_id = 1, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        self._run, TaskIdentity.run_id = run, run.run_id

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(range(FIRST_NODE, FIRST_NODE + self.clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(f"message {len(self.replies)} of {id(self)}")
            message.metadata._message_id = ids[-1]  # as a SuperLink would
            node = message.metadata.dst_node_id
            about = {"partition-id": node - FIRST_NODE, "state-dir": self.state}
            try:
                reply = app(message, Context(1, node, about, RecordDict(), self.run_config))
            except Exception as error:  # as a SuperNode has it
                reason = f"{type(error).__name__}: {error}"
                reply = Message(
                    Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message
                )
            for record in reply.content.array_records.values() if reply.has_content() else ():
                for key, array in list(record.items()):
                    # the app's next job overwrites what it sent
                    record[key] = NdArray(array.numpy().copy())
            self.replies[ids[-1]] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [i for i in message_ids if self.replies.get(i)]
        return [self._taken(i) for i in found]

    def _taken(self, message_id: str) -> Message:
        reply, self.replies[message_id] = self.replies[message_id], None
        return reply

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def run_here(*overrides: str) -> dict[str, Any]:
    """`fedgpt run overrides`, in this process; returns the summary."""
    options = compose.load(overrides)
    _, shards = shards_of(options)
    return serve(
        options,
        HereGrid(len(shards), {"config": compose.to_yaml(options)}, f"{options.run_dir}/clients"),
    )


def tiny_run(folder: Path) -> list[str]:
    """Options of the smallest run there is: two writers of text as clients, 3 rounds, everything
    below `folder`.
    """
    for writer in ("ann", "bob"):
        (folder / "text" / writer).mkdir(parents=True)
        for page in range(6):
            text = "\n".join(
                f"{writer} wrote on page {page}, line {n}: the river rose again." for n in range(12)
            )
            (folder / "text" / writer / f"{page}.txt").write_text(text)
    return [
        "corpus=files",
        "corpus.client=folder",
        f"corpus.path={folder / 'text'}",
        "corpus.public=0.2",
        "corpus.held_out=0.2",
        "tokenizer=bytes",
        "model.n_layer=1",
        "model.n_embd=16",
        "model.n_head=2",
        "model.block_size=16",
        "local.steps=1",
        "local.batch_size=2",
        "rounds=3",
        "runtime.threads=1",
        "local.precision=fp32",
        "evaluate.samples=0",
        f"run_dir={folder / 'run'}",
        f"cache_dir={folder / 'cache'}",
    ]
