"""The store of the objects that wait at the link."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import NoObjectInStoreError

from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy.objects_in_files import SMALL, ObjectsInFiles
from fedgpt.flower.deploy.waiting import Bell

RUN, OTHER = 1, 2  # ids of runs


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "objects"


@pytest.fixture
def store(folder) -> ObjectsInFiles:
    return ObjectsInFiles(folder, Bell())


def record(size: int, seed: int = 0) -> ArrayRecord:
    """A record of one array of so many bytes, which is one chunk."""
    return ArrayRecord([np.random.default_rng(seed).integers(0, 255, size, np.uint8)])


def kept(store: ObjectsInFiles, one: ArrayRecord, run: int = RUN) -> dict[str, bytes]:
    """Put a record's objects into the store; their contents by id."""
    contents = {key: part.deflate() for key, part in get_all_nested_objects(one).items()}
    for key in store.preregister(run, get_object_tree(one)):
        assert store.get(key) == b"", "known, but not there yet"
        store.put(key, contents[key])
    return contents


def test_large_objects_are_files_and_all_are_found(store, folder):
    contents = kept(store, record(3 * SMALL))
    assert {key: store.get(key) for key in contents} == contents
    (file,) = folder.iterdir()
    assert file.stat().st_size > 3 * SMALL
    assert max(len(entry.content or b"") for entry in store._objects.values()) <= SMALL
    assert store.get("f" * 64) is None


def test_an_object_goes_with_the_last_message_that_has_it(store, folder):
    shared = record(2 * SMALL)
    one, two = ArrayRecord(), ArrayRecord()
    one["a"], two["b"] = shared["0"], shared["0"]
    kept(store, one)
    kept(store, two, OTHER)
    store.delete(one.object_id)
    assert len(list(folder.iterdir())) == 1 and one.object_id not in store
    store.delete_objects_in_run(OTHER)
    assert not list(folder.iterdir()) and len(store) == 0


def test_a_link_begins_with_no_objects(store, folder):
    contents = kept(store, record(2 * SMALL))
    assert list(folder.iterdir())
    fresh = ObjectsInFiles(folder, Bell())
    assert not list(folder.iterdir()) and folder.stat().st_mode & 0o777 == 0o700
    assert all(fresh.get(key) is None for key in contents)
    kept(fresh, record(2 * SMALL))
    fresh.clear()
    assert not list(folder.iterdir()) and len(fresh) == 0


def test_content_that_is_not_the_object_is_refused(store, folder):
    one, other = record(2 * SMALL), record(2 * SMALL, seed=1)
    store.preregister(RUN, get_object_tree(one))
    chunk = next(iter(get_all_nested_objects(one)))
    with pytest.raises(ValueError, match="does not match content hash"):
        store.put(chunk, next(iter(get_all_nested_objects(other).values())).deflate())
    assert store.get(chunk) == b"" and not list(folder.iterdir())


def test_what_one_message_says_of_an_object_changes_no_other_message(store):
    """A site may announce the objects of another's message with other children, before or after."""
    one, foreign = record(100), get_object_tree(record(100, seed=1))
    own = get_object_tree(one)
    for number, before in enumerate((True, False)):
        lie = ObjectTree(
            object_id=str(number) * 64,
            children=[ObjectTree(object_id=own.children[0].object_id, children=[foreign])],
        )
        if before:
            store.preregister(RUN, lie)
        contents = kept(store, one)
        if not before:
            store.preregister(RUN, lie)
        assert store.get_object_tree(one.object_id) == own
        store.delete(lie.object_id)
        assert {key: store.get(key) for key in contents} == contents
        assert foreign.object_id not in store
        store.delete(one.object_id)
        assert len(store) == 0


def test_a_message_keeps_the_objects_that_it_was_announced_with(store):
    own, other = get_object_tree(record(100)), get_object_tree(record(100, seed=1))
    missing = store.preregister(RUN, own)
    assert store.preregister(RUN, own) == missing, "the answer was lost, and it is asked again"
    changed = ObjectTree(object_id=own.object_id, children=[other])
    with pytest.raises(ValueError, match="had other objects"):
        store.preregister(RUN, changed)
    with pytest.raises(ValueError, match="is not the id of an object"):
        store.preregister(
            RUN, ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="../x")])
        )
    assert other.object_id not in store and "a" * 64 not in store
    nobodys = record(100, seed=1)
    with pytest.raises(NoObjectInStoreError, match="no message has the object"):
        store.put(nobodys.object_id, nobodys.deflate())
    with pytest.raises(NoObjectInStoreError, match="was announced"):
        store.get_object_tree(own.children[0].object_id)


def test_on_a_full_disk_contents_stay_in_memory_and_the_log_says_so(folder, store, caplog):
    one = record(4 * SMALL)
    store.preregister(RUN, get_object_tree(one))
    folder.rmdir()  # nothing can be written there
    for object_id, content in get_all_nested_objects(one).items():
        store.put(object_id, content.deflate())
        assert store.get(object_id) == content.deflate()
    assert caplog.text.count("messages stay in memory") == 1


def test_the_folder_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / ("a" * 64)).write_bytes(b"of an earlier start")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    ObjectsInFiles(tmp_path / "link", Bell())
    assert not list((tmp_path / "disk").iterdir())


def test_a_folder_that_cannot_be_emptied_is_named(tmp_path):
    (tmp_path / "objects" / "of somebody").mkdir(parents=True)
    with pytest.raises(FedGPTError, match="objects cannot be emptied: Is a directory"):
        ObjectsInFiles(tmp_path / "objects", Bell())
