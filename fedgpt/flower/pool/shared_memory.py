"""Arrays in anonymous shared memory, and a Flower Array around an ndarray, without serialisation.

The server and the workers of the pool exchange large arrays through `Memory`. Only file descriptors
refer to it, and it has no file in /dev/shm. So the kernel frees all of it when the processes end,
also after kill -9.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, SType
from numpy.lib import format as npy

ALIGN = 64  # alignment of offsets in bytes: a cache line, which suits every vector load


class Memory:
    """Anonymous shared memory; its mappings stay valid after the descriptor is closed."""

    def __init__(self, descriptor: int):
        """Take over `descriptor`."""
        self._descriptor = descriptor

    @classmethod
    def holding(cls, parts: Sequence[np.ndarray]) -> tuple[Memory, list[int]]:
        """New memory with a copy of each array, and the offset of each in bytes."""
        offsets, end = [], 0
        for part in parts:
            offsets.append(end)
            end += -(-part.nbytes // ALIGN) * ALIGN
        memory = cls(_anonymous_file())
        os.ftruncate(memory.fileno(), max(end, 1))  # an empty file cannot be mapped
        for part, offset in zip(parts, offsets, strict=True):
            # writing to the file causes no page faults and zeroes no pages, unlike a copy into a
            # mapping
            _write(memory.fileno(), np.ascontiguousarray(part).reshape(-1).view(np.uint8), offset)
        _seal(memory.fileno())
        return memory, offsets

    def fileno(self) -> int:
        """The descriptor; raises ValueError once closed."""
        if self._descriptor < 0:
            raise ValueError("this shared memory is closed")
        return self._descriptor

    def view(self) -> np.ndarray:
        """All bytes, read-only and without a copy; the view keeps the mapping alive."""
        # a private mapping, because older kernels refuse a shared one of sealed memory; processes
        # share the pages in both cases
        mapping = mmap.mmap(self.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        return np.frombuffer(mapping, np.uint8)

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # an error at interpreter exit has no reader
            self.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedgpt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as stream:  # not Linux: a file without a name
        return os.dup(stream.fileno())


def _write(descriptor: int, data: np.ndarray, offset: int) -> None:
    """Write all of `data` (bytes); one call moves at most 2 GiB."""
    left = data.data  # a memoryview
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written


def _seal(descriptor: int) -> None:
    """Forbid changes of content and size, so that readers see no incomplete array and get no
    SIGBUS.
    """
    if hasattr(os, "memfd_create"):
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


class NdArray(Array):
    """A Flower Array around an ndarray, which is never copied; treat it as read-only.

    The bytes of np.save (`data`) are made only when they are asked for. Over a SuperLink it is
    sent as a plain Array, because the receiver looks up the class by its name; over Ray as an
    NdArray. Insert it with `record[key] = NdArray(a)` or use `array_record`: `ArrayRecord({...})`
    would build plain Arrays and serialise them at once.
    """

    def __init__(self, ndarray: np.ndarray):
        """Keep a reference to `ndarray`; raises TypeError for object and structured dtypes."""
        if ndarray.dtype.hasobject or ndarray.dtype.names is not None:
            raise TypeError(f"an array of dtype {ndarray.dtype} cannot be sent; plain numbers can")
        fields = {"dtype": str(ndarray.dtype), "shape": tuple(ndarray.shape), "stype": SType.NUMPY}
        self.__dict__.update(fields, _ndarray=ndarray)  # without Array.__init__, which serialises

    def numpy(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self.__dict__["_ndarray"]

    @property
    def data(self) -> bytes:  # type: ignore[override]  # a field in the base class, computed here
        """The bytes of np.save."""
        return b"".join(_npy(self.numpy()))

    @property
    def _plain(self) -> Array:
        """The same array as Flower's own class, made once; its chunks are views of this array."""
        if "_plain" not in self.__dict__:
            plain = Array(self.dtype, self.shape, self.stype, b"")
            chunks = map(ArrayChunk, _chunks(self.numpy()))
            plain.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
            self.__dict__["_plain"] = plain
        return self.__dict__["_plain"]

    def deflate(self) -> bytes:
        """The header and body of a plain Array."""
        return self._plain.deflate()

    def slice_array(self) -> list[tuple[str, Any]]:
        """The chunks of a plain Array."""
        return self._plain.slice_array()

    @property
    def object_id(self) -> str:
        """The id of a plain Array."""
        return self._plain.object_id

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        mine = (self.dtype, self.shape, self.stype)
        return mine == (other.dtype, tuple(other.shape), other.stype) and self.data == other.data

    __hash__ = None  # type: ignore[assignment]  # not hashable, like Array

    def __reduce__(self) -> tuple[Any, ...]:
        return NdArray, (self.numpy(),)  # for Ray and copy.deepcopy: without the serialised copy

    def __repr__(self) -> str:
        return f"NdArray(dtype={self.dtype!r}, shape={self.shape})"


def array_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """An ArrayRecord of `arrays`, which are neither copied nor serialised.

    Build one per version and share it between messages: the pool then writes it to shared memory
    only once.
    """
    record = ArrayRecord()
    for key, value in arrays.items():
        record[key] = NdArray(value)
    return record


def share(arrays: Sequence[Array]) -> tuple[Memory, list[dict[str, Any]]]:
    """Write Flower Arrays into new memory; returns JSON specs of their places for `attach`."""
    parts, specs = [], []
    for array in arrays:
        part = _decoded(array)
        if part is None:  # not a plain array: its bytes are sent as they are
            part = np.frombuffer(array.data, np.uint8)
            specs.append(
                {
                    "stype": array.stype,
                    "dtype": array.dtype,
                    "shape": list(array.shape),
                    "bytes": part.nbytes,
                }
            )
        else:
            specs.append({"dtype": part.dtype.str, "shape": list(part.shape), "bytes": part.nbytes})
        parts.append(part)
    memory, offsets = Memory.holding(parts)
    for spec, offset in zip(specs, offsets, strict=True):
        spec["offset"] = offset
    return memory, specs


def attach(memory: Memory, specs: Sequence[Mapping[str, Any]]) -> list[Array]:
    """The arrays that `share` wrote, as read-only views; `memory` may be closed afterwards."""
    content, arrays = memory.view(), []
    for spec in specs:
        part = content[spec["offset"] : spec["offset"] + spec["bytes"]]
        shape = tuple(spec["shape"])
        if "stype" in spec:
            arrays.append(
                Array(dtype=spec["dtype"], shape=shape, stype=spec["stype"], data=part.tobytes())
            )
        else:
            arrays.append(NdArray(part.view(spec["dtype"]).reshape(shape)))
    return arrays


def _npy(array: np.ndarray) -> tuple[memoryview, memoryview]:
    """The header and the values of an array as np.save writes them; the values are a view."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    return header.getbuffer(), array.reshape(-1).view(np.uint8).data


def _chunks(array: np.ndarray) -> Iterator[memoryview]:
    """What np.save writes in pieces of Flower's size: only the first one is a copy."""
    header, values = _npy(array)
    first = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE - len(header)
    yield memoryview(b"".join([header, values[:first]]))
    for start in range(first, len(values), FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE):
        yield values[start : start + FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE]


def _decoded(array: Array) -> np.ndarray | None:
    """The ndarray inside, or None if the bytes are no plain array; the receiver rejects them."""
    if isinstance(array, NdArray):
        return array.numpy()
    try:
        value = array.numpy()
    except Exception:  # damaged .npy bytes may raise almost any exception
        return None
    if not isinstance(value, np.ndarray) or value.dtype.hasobject or value.dtype.names is not None:
        return None  # np.load also returns archives and structured arrays
    return value
