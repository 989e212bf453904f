"""A message as objects: the bits that Flower sends and reads, and how much memory a model takes."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from support.superlink import LiveSuperLink, next_message, send

from fedgpt.flower import fetch, objects
from fedgpt.flower.deploy.objects_in_files import ObjectsInFiles
from fedgpt.flower.deploy.waiting import Bell
from fedgpt.flower.fetch import Fetcher
from fedgpt.flower.messages import ARRAY, read_reply, update_content, values_of, vector_record
from fedgpt.flower.objects import AT_ONCE, in_order, put_together, taken_apart
from fedgpt.flower.push import push

SIZE = 25_000_000  # numbers of float32: 100 MB, 20 chunks


def values(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(size, dtype=np.float32)


def message(*arrays: np.ndarray, plain: bool = False) -> Message:
    """A reply with a record for each array, as this package or as Flower makes it."""
    made = [ArrayRecord({ARRAY: Array(one)}) if plain else vector_record(one) for one in arrays]
    content = RecordDict({f"record {number}": one for number, one in enumerate(made)})
    content["about"] = ConfigRecord({"json": "{}"})
    return Message(content, dst_node_id=7, message_type=MessageType.TRAIN)


@pytest.fixture(autouse=True)
def task(link):
    """The identity without which Flower makes no message."""
    link.grid()


@pytest.mark.parametrize(
    "arrays",
    [
        [values(5)],
        [values(3_000_000), values(4_000_000, seed=1)],
        [np.zeros(6_000_000, np.float32), values(1)],  # equal chunks, which are sent once
        [np.empty(0, np.float32), np.arange(6).reshape(2, 3)],
    ],
    ids=["small", "two", "zeros", "shapes"],
)
def test_an_array_has_the_objects_that_flower_makes_of_it_and_arrives(arrays):
    one = message(*arrays)
    tree, parts = taken_apart(one)
    assert one.metadata.message_id == tree.object_id
    theirs = message(*arrays, plain=True)
    theirs.metadata.__dict__.update(one.metadata.__dict__)
    assert tree == get_object_tree(theirs)
    contents = {key: part.deflate() for key, part in parts.items()}
    assert contents == {key: o.deflate() for key, o in get_all_nested_objects(theirs).items()}
    got = put_together(tree, lambda ids: (contents[key] for key in ids))
    assert got.metadata.message_id == tree.object_id and got.content["about"]["json"] == "{}"
    for number, array in enumerate(arrays):
        record = got.content[f"record {number}"]
        assert isinstance(record, ArrayRecord)
        found = values_of(record[ARRAY])
        assert found.dtype == array.dtype and np.array_equal(found, array)
        assert not found.flags.writeable


def test_what_a_message_is_made_of_is_sent_before_its_chunks():
    _, parts = taken_apart(message(values(3_000_000)))
    kinds = [type(one).__qualname__ for one in parts.values()]
    assert kinds[-3:] == ["ArrayChunk"] * 3 and "ArrayChunk" not in kinds[:-3]


def test_an_array_must_have_its_chunks_where_the_tree_names_them():
    """Otherwise a tree could hide an array that repeats a chunk a million times."""
    zeros = message(np.zeros(6_000_000, np.float32))
    tree, parts = taken_apart(zeros)
    contents = {key: part.deflate() for key, part in parts.items()}
    arrays = [key for key, content in contents.items() if objects.is_array(content)]

    def changed(node: ObjectTree, below: bool) -> ObjectTree:
        """The tree with the arrays as leaves; their chunks are `below` the message, or nowhere."""
        children = [
            changed(child, below) for child in node.children if node.object_id not in arrays
        ]
        if below and node.object_id == tree.object_id:
            children += [ObjectTree(object_id=chunk) for chunk in chunks]
        return ObjectTree(object_id=node.object_id, children=children)

    chunks = [key for key, part in parts.items() if type(part).__qualname__ == "ArrayChunk"]
    for below in (False, True):
        with pytest.raises(ValueError, match="whose chunks the message does not name"):
            put_together(changed(tree, below), lambda ids: (contents[key] for key in ids))


def test_results_come_in_order_and_an_error_ends_the_rest():
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.02 if number % 2 else 0.0)
        if number == 5:
            raise OSError("broken off")
        return number

    with ThreadPoolExecutor(AT_ONCE) as executor:
        found = in_order(executor, work, range(1000))
        assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="broken off"):
            list(found)
    assert len(begun) <= 5 + AT_ONCE


class Peak:
    """Memory that is allocated in a block at most, beyond that before it, in models."""

    def __enter__(self) -> Peak:
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]
        return self

    def __exit__(self, *error: object) -> None:
        self.models = (tracemalloc.get_traced_memory()[1] - self._before) / (4 * SIZE)


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """A thread that collects garbage all the time: the web server's requests are in reference
    cycles, and the memory in use must not depend on when Python collects them.
    """
    ended = threading.Event()

    def collect() -> None:
        while not ended.wait(0.002):
            gc.collect()

    gc.collect()
    gc.freeze()  # what is older need not be looked at, so that a collection is quick
    thread = threading.Thread(target=collect)
    thread.start()
    yield
    ended.set()
    thread.join()
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.long
def test_a_model_is_in_memory_once_where_it_is_received_and_never_again_where_it_is_sent(
    link: LiveSuperLink, tmp_path: Path, monkeypatch, no_garbage
):
    """Server, link and client are in this process, so that each bound is for all three of them.

    A request has some copies of its own chunk, one object at a time is under way here.
    """
    monkeypatch.setattr(objects, "AT_ONCE", 1)
    monkeypatch.setattr(fetch, "IN_MEMORY", 1000)
    monkeypatch.setattr(link.state, "_object_store", ObjectsInFiles(tmp_path / "o", Bell()))
    # the copies of chunks that are under way, each 5 % of the model: less than one more model
    slack = 0.6
    node, connection = link.node()
    grid = link.grid()
    fetcher = Fetcher(grid)
    params = values(SIZE)
    tracemalloc.start()
    try:
        with Peak() as sending:
            content = RecordDict({"params": vector_record(params)})
            (number,) = push(grid, [Message(content, node, MessageType.TRAIN)])
        assert number is not None and sending.models < slack
        with Peak() as receiving:
            job = next_message(connection)
            record = job.content["params"]
            assert isinstance(record, ArrayRecord)
            got = values_of(record[ARRAY])
        assert np.array_equal(got, params) and receiving.models < 1 + slack
        fetcher.watch(number, 8 * SIZE)
        delta = values(SIZE, seed=1)
        with Peak() as uploading:
            send(connection, Message(update_content("{}", delta), reply_to=job))
            deadline = time.monotonic() + 60
            while not fetcher._complete:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert uploading.models < slack
        with Peak() as fetching:
            found = fetcher.take()
            assert found is not None and isinstance(found[1], Message)
            payload = read_reply(found[1], "a", 0).payload
        assert np.array_equal(payload, delta) and fetching.models < 1 + slack
        del found, payload, job, record, got
        left = tracemalloc.get_traced_memory()[0] / (4 * SIZE)
        assert left < 1 + slack, "only the update that was sent is still in memory"
    finally:
        tracemalloc.stop()
        fetcher.close()
