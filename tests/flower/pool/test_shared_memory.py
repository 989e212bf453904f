"""Shared memory and NdArray: no copies, equal after every transport, no descriptor left open."""

import copy
import gc
import io
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedgpt.flower.pool.channel import Channel, Frame, put_together, take_apart
from fedgpt.flower.pool.shared_memory import ALIGN, Memory, NdArray, array_record, attach, share

DTYPES = ["float32", "float64", "float16", "int8", "uint8", "int64", "bool", ">f4", "complex64"]


def descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2)])
def test_arrays_come_back_equal_and_read_only(dtype, shape):
    value = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    memory, specs = share([NdArray(value), NdArray(np.ones(3))])
    back, ones = (array.numpy() for array in attach(memory, specs))
    memory.close()
    assert back.dtype == value.dtype and back.shape == value.shape and not back.flags.writeable
    np.testing.assert_array_equal(back, value)
    np.testing.assert_array_equal(ones, np.ones(3))
    assert all(spec["offset"] % ALIGN == 0 for spec in specs)


def test_non_contiguous_arrays():
    value = np.arange(24.0).reshape(4, 6)
    memory, specs = share([NdArray(value.T), NdArray(value[::2, 1:])])
    for back, expected in zip(attach(memory, specs), (value.T, value[::2, 1:]), strict=True):
        np.testing.assert_array_equal(back.numpy(), expected)


def test_attached_arrays_are_views_of_one_mapping_and_free_it():
    before = descriptors()
    memory, specs = share([NdArray(np.arange(10_000)), NdArray(np.arange(5))])
    first, second = (array.numpy() for array in attach(memory, specs))
    bases = [
        a.base.base if isinstance(a.base.base, np.ndarray) else a.base for a in (first, second)
    ]
    assert bases[0] is bases[1]
    memory.close()
    memory.close()
    assert first[-1] == 9999
    del first, second, bases
    assert descriptors() == before
    with pytest.raises(ValueError, match="closed"):
        memory.fileno()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="seals are Linux's")
def test_written_memory_cannot_be_changed_or_shrunk():
    memory, _ = Memory.holding([np.zeros(10)])
    with pytest.raises(PermissionError):
        os.pwrite(memory.fileno(), b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fileno(), 1)


def test_without_memfd_an_unlinked_file_is_used(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    memory, specs = share([NdArray(np.arange(100))])
    np.testing.assert_array_equal(attach(memory, specs)[0].numpy(), np.arange(100))


def test_plain_and_foreign_arrays():
    good = Array(np.arange(6.0).reshape(2, 3))
    foreign = Array(dtype="bf16", shape=(2,), stype="mine", data=b"1234")
    damaged = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=b"not an npy file")
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones(2))
    archive = Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=buffer.getvalue())
    memory, specs = share([good, foreign, damaged, archive])
    back = attach(memory, specs)
    assert back[0] == good
    assert back[1] == foreign
    assert back[2] == damaged and back[3] == archive


def test_ndarray_neither_copies_nor_serialises_until_asked():
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    array = NdArray(value)
    record = array_record({"w": value})
    assert array.numpy() is value and record["w"].numpy() is value
    assert "_plain" not in array.__dict__
    assert len(repr(array)) < 100
    assert array == Array(value) and Array(value) == array and array != NdArray(value + 1)
    assert array.data == Array(value).data


@pytest.mark.parametrize("dtype", [object, [("a", "f4")]])
def test_ndarray_refuses_other_values_than_numbers(dtype):
    with pytest.raises(TypeError, match="cannot be sent"):
        NdArray(np.zeros(2, dtype))


def test_ndarray_over_a_superlink_is_a_plain_array():
    value = np.random.default_rng(0).normal(size=3_000_000)  # several chunks
    record = array_record({"w": value})
    plain = ArrayRecord([value])
    assert record["w"].object_id == plain["0"].object_id
    objects = get_all_nested_objects(record)
    array = record["w"]
    back = Array.inflate(objects[array.object_id].deflate(), array.children)
    np.testing.assert_array_equal(back.numpy(), value)


def test_ndarray_through_ray_and_deepcopy():
    memory, specs = share([NdArray(np.arange(1000.0))])
    array = attach(memory, specs)[0]
    _ = array.data  # the serialised copy must not travel
    wire = pickle.dumps(RecordDict({"a": array_record({"w": array.numpy()})}), protocol=5)
    assert len(wire) < 9000
    np.testing.assert_array_equal(pickle.loads(wire)["a"]["w"].numpy(), array.numpy())
    buffers = []
    wire = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    back = pickle.loads(wire, buffers=buffers)
    assert np.shares_memory(back.numpy(), array.numpy())  # what Ray's object store does
    copied = copy.deepcopy(array)
    assert copied == array and not np.shares_memory(copied.numpy(), array.numpy())


def test_records_keep_names_order_and_types():
    content = RecordDict(
        {
            "config": ConfigRecord(
                {"b": b"\x00\xff", "s": "é", "f": 0.1, "t": True, "l": [1, 2], "x": [b"a"]}
            ),
            "arrays": array_record({"z": np.ones(2), "a": np.zeros(3)}),
            "metrics": MetricRecord({"loss": float("nan"), "n": 2**40, "list": [0.5]}),
            "empty": ArrayRecord(),
        }
    )
    parts = take_apart(content)
    back = put_together(parts.records, parts.body, parts.arrays)
    assert list(back) == list(content)
    assert back["config"] == content["config"] and type(back["config"]["t"]) is bool
    assert list(back["arrays"]) == ["z", "a"] and back["arrays"]["a"] is content["arrays"]["a"]
    assert np.isnan(back["metrics"]["loss"]) and back["metrics"]["n"] == 2**40


def test_channel_carries_frames_and_descriptors_through_small_reads():
    before = descriptors()
    left, right = socket.socketpair()
    left.setblocking(False)
    sender, receiver = Channel(left), Channel(right)
    sent = [
        Frame({"i": i}, bytes([i]) * (300_000 * (i % 2)), Memory.holding([np.full(4, i)])[0])
        for i in range(6)
    ]
    done = [sender.send(frame) for frame in sent]
    assert not all(done)  # more than the buffer of a socket: nothing blocked
    received = []
    while len(received) < len(sent):
        received += receiver.receive()
        sender.flush()
    for i, frame in enumerate(received):
        assert frame.header == {"i": i} and frame.body == sent[i].body
        np.testing.assert_array_equal(frame.memory.view().view(int)[:4], np.full(4, i))
    sender.close()
    with pytest.raises(EOFError):
        receiver.receive()
    receiver.send(Frame({"nobody": "listens"}))
    receiver.close()
    del sent, received, frame
    assert descriptors() == before
