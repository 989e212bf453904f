"""Reading an array in `.npy` format, as Flower sends it, from a sender that may be hostile.

    magic | header: shape, order, dtype | data     the header must fit the length of the data

`np.load` is not safe for this: it also opens archives, ignores trailing bytes, and allocates as
much memory as the header claims.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
from numpy.lib import format as npy

from fedgpt.core.errors import UpdateRejected

LONGEST_HEADER = 1 << 17  # bytes; numpy refuses headers that are longer than a tenth of that
READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(data: bytes | bytearray) -> np.ndarray:
    """Return the array in `data`, a read-only view; raises UpdateRejected and nothing else.

    >>> buffer = io.BytesIO(); np.save(buffer, np.arange(3)); read_npy(buffer.getvalue()).tolist()
    [0, 1, 2]
    """
    stream = io.BytesIO(data[:LONGEST_HEADER])  # not all of it, which would be a copy
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python's parser warns about some malformed headers
            shape, fortran, dtype = READERS[npy.read_magic(stream)](stream)
    except Exception as error:  # a hostile header can raise many exceptions
        raise UpdateRejected(
            "bad_encoding", f"no header of an array ({type(error).__name__})"
        ) from error
    if dtype.hasobject:
        raise UpdateRejected("pickle_refused", "an array of objects")
    if fortran:
        raise UpdateRejected("bad_encoding", "an array in the order of Fortran")
    claimed, left = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if claimed != left:
        raise UpdateRejected(
            "size_mismatch", f"{left} bytes follow the header, which claims another number"
        )
    try:
        found = np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)
    # a negative length, a bool, more axes than numpy allows, or elements of no bytes
    except (TypeError, ValueError) as error:
        raise UpdateRejected(
            "bad_encoding", f"no shape of an array ({type(error).__name__})"
        ) from error
    found.flags.writeable = False
    return found
