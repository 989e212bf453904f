"""The contents of messages that wait at the link: in files, not in its database or memory.

Flower's own choices are its database, in which each object is written twice and its space is never
given back, and memory, of which the replies of many clients would take one model each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

from fedgpt.flower.deploy.waiting import Bell

SMALL = 1 << 16  # bytes of an object that stays in memory


class ObjectsInFiles(InMemoryObjectStore):
    """Which objects there are is in memory; the large ones are files of a folder.

    A link that starts begins with none: the runs of the one before it have ended with it, and what
    continues a run sends its jobs again.
    """

    def __init__(self, folder: Path, bell: Bell):
        """Empty the folder; the bell rings for each object that has come."""
        super().__init__()
        self._folder, self._bell = folder, bell
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)

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
                    self._file(object_id).write_bytes(object_content)
                    entry.content = b""  # of an object that is available: it is in the file
        self._bell.ring(object_id)

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
