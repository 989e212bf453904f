"""The contents of messages that wait at the link: in files, not in its database or memory.

Flower's own choices are its database, in which each object is written twice and its space is never
given back, and memory, of which the replies of many clients would take one model each.

Both believe whoever announces an object first what it is made of, and let it stand for all messages
with the object: a site could make another's message unreadable. Here each message has the tree that
was announced with it, and an object belongs to all messages whose trees have it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, is_valid_sha256_hash
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStore

from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy.waiting import Bell
from fedgpt.flower.objects import order

SMALL = 1 << 16  # bytes of an object that stays in memory
log = logging.getLogger(__name__)


@dataclass
class _Object:
    messages: set[str] = field(default_factory=set)  # ids of those that have it
    content: bytes | None = None  # None until it comes; empty if it is in a file


class _Thread(threading.local):
    asks_for_all = False


class ObjectsInFiles(ObjectStore):
    """Which objects there are is in memory; the large ones are files of a folder.

    A link that starts begins with none: the runs of the one before it have ended with it, and what
    continues a run sends its jobs again.
    """

    def __init__(self, folder: Path, bell: Bell):
        """Empty the folder; the bell rings for each object that has come.

        Raises FedGPTError if that is not possible.
        """
        self._folder, self._bell = folder, bell
        self._lock, self._thread = threading.RLock(), _Thread()
        self._objects: dict[str, _Object] = {}
        self._messages: dict[str, tuple[int, ObjectTree]] = {}  # id -> its run and objects
        self._told = False  # whether the log says that the disk takes no more
        try:
            folder.mkdir(mode=0o700, exist_ok=True)  # it may be a link to another disk
            for path in folder.iterdir():
                path.unlink()
        except OSError as error:
            raise FedGPTError(f"{folder} cannot be emptied: {error.strerror}") from error

    @contextmanager
    def asking_for_all(self) -> Iterator[None]:
        """Let this thread's announcements be asked for every object, also for those that are here.

        Otherwise a site would learn from the answer which objects others have sent.
        """
        self._thread.asks_for_all = True
        try:
            yield
        finally:
            self._thread.asks_for_all = False

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Note the objects of a message; the ids of those that are asked for, each once.

        Raises ValueError for what is not an id, and for a message that had other objects before.
        """
        message, ids = object_tree.object_id, _ids(object_tree)
        for object_id in ids:
            if not is_valid_sha256_hash(object_id):
                raise ValueError(f"{object_id!r} is not the id of an object")
        with self._lock:
            _, known = self._messages.setdefault(message, (run_id, object_tree))
            if known != object_tree:
                raise ValueError(f"message {message} had other objects")
            for object_id in ids:
                self._objects.setdefault(object_id, _Object()).messages.add(message)
            if self._thread.asks_for_all:
                return ids
            return [one for one in ids if self._objects[one].content is None]

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """The tree that was announced with a message; raises NoObjectInStoreError without one."""
        with self._lock:
            if object_id not in self._messages:
                raise NoObjectInStoreError(f"no message {object_id} was announced")
            return self._messages[object_id][1]

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep the content of an object.

        Raises ValueError where its id is not its digest, and NoObjectInStoreError where no message
        has it.
        """
        if get_object_id(object_content) != object_id:
            raise ValueError(f"object {object_id} does not match content hash")
        validate_object_content(object_content)
        with self._lock:
            if (entry := self._objects.get(object_id)) is None:
                raise NoObjectInStoreError(f"no message has the object {object_id}")
            if entry.content is None:
                large = len(object_content) > SMALL
                entry.content = (
                    self._written(object_id, object_content) if large else object_content
                )
        self._bell.ring(object_id)

    def _written(self, object_id: str, content: bytes) -> bytes:
        """What stays in memory of an object: nothing if it is in its file."""
        path = self._file(object_id)
        try:
            path.write_bytes(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            if not self._told:
                log.error("%s: %s; messages stay in memory", self._folder, error.strerror)
            self._told = True
            return content
        return b""

    def get(self, object_id: str) -> bytes | None:
        """The content of an object: empty if it has not come yet, None for an unknown object."""
        with self._lock:
            entry = self._objects.get(object_id)
            if entry is None:
                return None
            if entry.content == b"":
                return self._file(object_id).read_bytes()
            return entry.content or b""

    def delete(self, object_id: str) -> None:
        """Delete a message, and of its objects those that no other message has."""
        with self._lock:
            if object_id not in self._messages:
                return
            _, tree = self._messages.pop(object_id)
            for one in _ids(tree):
                entry = self._objects[one]
                entry.messages.discard(object_id)
                if not entry.messages:
                    del self._objects[one]
                    self._file(one).unlink(missing_ok=True)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Delete the messages of a run."""
        with self._lock:
            for message in [one for one, (run, _) in self._messages.items() if run == run_id]:
                self.delete(message)

    def clear(self) -> None:
        """Delete all messages."""
        with self._lock:
            for message in list(self._messages):
                self.delete(message)

    def __contains__(self, object_id: str) -> bool:
        """Whether a message has the object."""
        return object_id in self._objects

    def __len__(self) -> int:
        """The number of objects."""
        return len(self._objects)

    def _file(self, object_id: str) -> Path:
        return self._folder / object_id


def _ids(tree: ObjectTree) -> list[str]:
    """The ids of a tree's objects, each once."""
    inner, leaves = order(tree)
    return inner + leaves
