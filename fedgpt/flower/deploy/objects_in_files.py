"""The contents of messages that wait at the link: in files, not in its database or memory.

Flower's own choices are its database, in which each object is written twice and its space is never
given back, and memory, of which the replies of many clients would take one model each.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy.waiting import Bell

SMALL = 1 << 16  # bytes of an object that stays in memory
log = logging.getLogger(__name__)


class ObjectsInFiles(InMemoryObjectStore):
    """Which objects there are is in memory; the large ones are files of a folder.

    A link that starts begins with none: the runs of the one before it have ended with it, and what
    continues a run sends its jobs again.
    """

    def __init__(self, folder: Path, bell: Bell):
        """Empty the folder; the bell rings for each object that has come.

        Raises FedGPTError if that is not possible.
        """
        super().__init__()
        self._folder, self._bell = folder, bell
        self._told = False  # whether the log says that the disk takes no more
        try:
            folder.mkdir(mode=0o700, exist_ok=True)  # it may be a link to another disk
            for path in folder.iterdir():
                path.unlink()
        except OSError as error:
            raise FedGPTError(f"{folder} cannot be emptied: {error.strerror}") from error

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Note the objects of a message; the ids of those that have no content yet.

        Raises ValueError where an object has other children than before, as Flower's store in a
        database does, and its store in memory does not.
        """
        with self.lock_store:
            for node in iterate_object_tree(object_tree):
                children = [child.object_id for child in node.children]
                if len(children) != len(set(children)):
                    raise ValueError(f"Object {node.object_id} has duplicate children.")
                known = self.store.get(node.object_id)
                if known is not None and set(known.child_object_ids) != set(children):
                    raise ValueError(f"Object {node.object_id} had different children.")
            return super().preregister(run_id, object_tree)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep the content of an object; raises ValueError where its id is not its digest."""
        super().put(object_id, object_content)
        if len(object_content) > SMALL:
            with self.lock_store:
                entry = self.store.get(object_id)
                if entry is not None and entry.content:
                    entry.content = self._written(object_id, object_content)
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
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is not None and entry.is_available and not entry.content:
                return self._file(object_id).read_bytes()
            return None if entry is None else entry.content

    def delete(self, object_id: str) -> None:
        """Delete an object that no other one refers to, and what only it referred to."""
        with self.lock_store:
            super().delete(object_id)
            if object_id not in self.store:
                self._file(object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all objects."""
        with self.lock_store:
            for object_id in self.store:
                self._file(object_id).unlink(missing_ok=True)
            super().clear()

    def _file(self, object_id: str) -> Path:
        return self._folder / object_id
