"""A long vector cut into slices, one for each core of the server, with one thread for each slice.

Threads suffice because numpy releases the GIL while it works on an array.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from fedgpt.core.device import cores

# elements of a vector up to which one thread finishes before a second one would have started
SINGLE_THREAD_ELEMENTS = 1 << 20
T = TypeVar("T")


def map_slices(size: int, work: Callable[[range], T]) -> list[T]:
    """The results of `work` on slices of equal length that cover `size` elements, in order."""
    threads = cores() if size > SINGLE_THREAD_ELEMENTS else 1
    step = max(1, -(-size // threads))
    slices = [range(start, min(start + step, size)) for start in range(0, size, step)]
    return [*_executor(threads).map(work, slices)] if threads > 1 else [*map(work, slices)]


@cache
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="aggregate")
