"""The store of the objects that wait at the link."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

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
    assert max(len(entry.content) for entry in store.store.values()) <= SMALL
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


def test_a_tree_cannot_change_the_children_of_an_object(store):
    one = record(100)
    kept(store, one)
    array = Array(np.arange(3))
    changed = ObjectTree(object_id=one.object_id, children=[get_object_tree(array)])
    with pytest.raises(ValueError, match="had different children"):
        store.preregister(RUN, changed)
    child = get_object_tree(array)
    twice = ObjectTree(object_id="a" * 64, children=[child, child])
    with pytest.raises(ValueError, match="duplicate children"):
        store.preregister(RUN, twice)
    assert "a" * 64 not in store and array.object_id not in store


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
