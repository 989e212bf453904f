"""Reading `.npy`: headers that fit the length of their data and still describe no array."""

from __future__ import annotations

import numpy as np
import pytest

from fedgpt.core.errors import UpdateRejected
from fedgpt.update.npy import read_npy


def npy(dtype: object, shape: tuple[int, ...], data: bytes) -> bytes:
    """A file of version 1.0 with any header."""
    fields = {"descr": dtype, "fortran_order": False, "shape": shape}
    header = repr(fields).encode().ljust(511) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def test_a_header_of_our_own_is_read():
    data = np.arange(6, dtype="<f4").tobytes()
    assert read_npy(npy("<f4", (2, 3), data)).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_npy(npy("<f4", (), data[4:8])).tolist() == 1


@pytest.mark.parametrize(
    "dtype, shape, count",
    [
        ("<f4", (-2, -3), 24),
        ("<f4", (0, -1), 0),
        ("<f4", (0, 10**30), 0),
        ("<f4", (0, 2**62, 2**62), 0),
        ("<f4", (True,), 4),
        ("<f4", (1,) * 70, 4),
        ("|V0", (5,), 0),
        ("|S0", (5,), 0),
    ],
)
def test_a_shape_or_a_dtype_of_no_array_is_rejected(dtype, shape, count):
    with pytest.raises(UpdateRejected, match="bad_encoding"):
        read_npy(npy(dtype, shape, bytes(count)))


@pytest.mark.parametrize(
    "changed",
    [
        (b"\x01\x00", b"\x03\x00"),  # an unknown version of the format
        (b"(1,)", b"(1L,)"),  # as Python 2 wrote it: numpy would warn and read it
        (b"'<f4'", b"{[]: 1}"),
        (b"(1,)", b"(" * 150),
        (b"'descr'", b"b'descr'"),
    ],
    ids=["version", "Python 2", "unhashable", "nested", "a key of bytes"],
)
def test_a_malformed_header_is_rejected_whatever_numpy_raises(changed):
    data = npy("<f4", (1,), bytes(4))
    old, new = changed
    assert old in data
    data = data.replace(old, new, 1)
    with pytest.raises(UpdateRejected, match=r"bad_encoding: no header of an array \("):
        read_npy(data.replace(b" " * (len(new) - len(old)) + b"\n", b"\n", 1))


def test_a_shape_beyond_every_number_of_bytes_is_rejected():
    with pytest.raises(UpdateRejected, match="size_mismatch: 8 bytes follow"):
        read_npy(npy("<f4", (10**400,), bytes(8)))
