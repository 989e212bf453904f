"""The rows that Flower's SuperLink keeps in a database, with fewer transactions for each object.

Flower 1.41 asks the database for every object of a message whether the run still goes on, which
node has the key of the sender, and adds up the bytes: four transactions, three of which write.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from flwr.app import Message
from flwr.common.constant import Status, SubStatus
from flwr.proto.message_pb2 import ObjectTree
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.run import RunStatus
from flwr.supercore.state.schema.corestate_models import ObjectPushSession, Task
from flwr.supercore.state.schema.linkstate_models import MessageRes, Node
from flwr.supercore.utils import uint64_to_int64
from flwr.superlink.federation import FederationManager
from sqlalchemy import select, update

from fedgpt.flower.deploy.objects_in_files import ObjectsInFiles
from fedgpt.flower.deploy.waiting import REPLY, Bell

# for which the status of a run may be old; what Flower does at the end of a run does not go by it
STATUS_SECONDS = 0.5
START_SECONDS = 300.0  # for a ServerApp to start
MOST_UPLOADS = 32  # of a node that are remembered
REPLY_SECONDS = 10.0  # for the server of a run to ask for a reply that is there
INVALID = ApiErrorCode.INVALID_PROTOBUF_PAYLOAD  # of which Flower makes the status 400
_NO_RUN = RunStatus(Status.FINISHED, SubStatus.STOPPED, "there is no such run")


class LinkState(SqlLinkState):
    """Flower's link state, which remembers what seldom changes."""

    def __init__(
        self, database: Path, manager: FederationManager, objects: ObjectsInFiles, bell: Bell
    ):
        """Open or make the database; raises SQLAlchemyError for a damaged one.

        The bell rings for each message.
        """
        super().__init__(str(database), manager, objects)
        self._bell = bell
        self._status: dict[int, tuple[float, RunStatus]] = {}  # run -> until when, its status
        self._node_of: dict[bytes, int] = {}  # public key -> node
        # node -> its latest uploads: Flower forgets whose they are when the server of the run has
        # heard of the reply, which is before its objects are there
        self._uploads: dict[int, deque[str]] = {}
        self.initialize()

    def store_message_and_object_tree(
        self, message: Message, object_tree: ObjectTree, session_id: str
    ) -> tuple[bool, list[str]]:
        """Store a message; whether it was, and the ids of its objects that are asked for.

        The server of a run is asked once for what it sends to many, a client for all of its reply.
        Raises FlowerError (400) for a reply that had other objects before.
        """
        about, objects = message.metadata, self.object_store
        of_client = bool(about.reply_to_message_id)
        assert isinstance(objects, ObjectsInFiles), "as it was made"
        stored: tuple[bool, list[str]] = (False, [])
        try:
            with objects.asking_for_all() if of_client else nullcontext():
                stored = super().store_message_and_object_tree(message, object_tree, session_id)
        except ValueError as damage:
            raise FlowerError(INVALID, str(damage), str(damage)) from damage
        finally:
            if of_client and not stored[0]:  # otherwise a session for each stays until the run ends
                self._cleanup_push_session(session_id, cleanup_messages=False)
        if stored[0] and of_client:
            latest = deque[str](maxlen=MOST_UPLOADS)
            self._uploads.setdefault(about.src_node_id, latest).append(session_id)
        if stored[0]:
            self._bell.ring(REPLY if of_client else about.dst_node_id)
        return stored

    def store_object(
        self, run_id: int, session_id: str, object_id: str, object_content: bytes
    ) -> bool:
        """Store an object of a message; whether it is stored, perhaps since an earlier request
        whose answer was lost.
        """
        stored = super().store_object(run_id, session_id, object_id, object_content)
        return stored or bool(self.object_store.get(object_id))

    def delete_messages(self, message_ins_ids: set[str]) -> None:
        """Delete messages of the server with their replies.

        Flower leaves the objects of a message that its node has never confirmed until the run ends.
        """
        super().delete_messages(message_ins_ids)
        for message_id in message_ins_ids:
            self.object_store.delete(message_id)

    def get_run_status(self, run_ids: set[int]) -> dict[int, RunStatus]:
        """The status of runs, at most STATUS_SECONDS old; one that does not exist is finished.

        Otherwise Flower would answer a node that names such a run with an internal error.
        """
        clock, known = time.monotonic(), self._status  # which other threads replace as a whole
        recent = {run: status for run, (until, status) in known.items() if clock < until}
        if not run_ids <= recent.keys():
            recent = super().get_run_status(run_ids)
            until = clock + STATUS_SECONDS
            self._status = known | {run: (until, status) for run, status in recent.items()}
        return {run: recent.get(run, _NO_RUN) for run in run_ids}

    def claim_task(self, task_id: int) -> str | None:
        """Give a task to whoever asks first, who has START_SECONDS for a first sign of life.

        Flower gives a ServerApp 30, and then starts another one beside it. On a slow or busy
        machine none would ever begin, and each would make the machine slower.
        """
        token = super().claim_task(task_id)
        if token is not None:
            until = now() + timedelta(seconds=START_SECONDS)
            with self.session() as session:
                session.execute(update(Task).where(Task.token == token).values(active_until=until))
        return token

    def finish_task(self, task_id: int, sub_status: str, details: str) -> bool:
        """Note that a task, such as that of a run, has ended."""
        try:
            return super().finish_task(task_id, sub_status, details)
        finally:
            self._status = {}

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """Let a node take part that has started; whether it may."""
        activated = super().activate_node(node_id, heartbeat_interval)
        if activated:
            self._give_up_uploads(node_id)
        return activated

    def deactivate_node(self, node_id: int) -> bool:
        """Note that a node has stopped; whether it was there.

        For a node that has gone Flower answers that it has gone, even if its reply is there: so
        while one waits for the server of the run, the node is taken as gone REPLY_SECONDS later.
        """
        deactivated = super().deactivate_node(node_id)
        if deactivated:
            self._give_up_uploads(node_id)
            number = uint64_to_int64(node_id)
            waits = select(MessageRes.message_id).where(
                MessageRes.src_node_id == number, MessageRes.delivered_at == ""
            )
            until = now().timestamp() + REPLY_SECONDS
            with self.session() as session:
                there = update(Node).where(Node.node_id == number, waits.exists())
                session.execute(there.values(online_until=until))
        return deactivated

    def _give_up_uploads(self, node_id: int) -> None:
        """Delete what a node has announced and not uploaded: its next start knows nothing of it.

        Flower, and the server of the run with it, would wait three minutes for the rest.
        """
        latest = self._uploads.pop(node_id, ())
        with self.session() as session:
            left = session.scalars(
                select(ObjectPushSession.session_id).where(
                    ObjectPushSession.session_id.in_(latest), ObjectPushSession.pending_count > 0
                )
            ).all()
            for session_id in left:
                self._cleanup_push_session(session_id, cleanup_messages=True)

    def get_node_id_by_public_key(self, public_key: bytes) -> int | None:
        """The node with a key, if it is registered."""
        node = self._node_of.get(public_key)
        if node is None and (node := super().get_node_id_by_public_key(public_key)) is not None:
            self._node_of[public_key] = node
        return node

    def delete_node(self, owner_aid: str, node_id: int) -> None:
        """Unregister a node for good."""
        try:
            super().delete_node(owner_aid, node_id)
        finally:
            self._node_of = {}

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Count nothing: the bytes of each job are in the run's events."""
