"""The server's cores share a long vector: each works on a part of its own, with numpy, which lets
the others run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from fedgpt.core.device import cores

ALONE = 1 << 20  # elements up to which one thread is done before others have begun
T = TypeVar("T")


def map_slices(size: int, work: Callable[[range], T]) -> list[T]:
    """What `work` returns for each part of a vector of `size` elements, in order; the parts are
    alike in length.
    """
    threads = cores() if size > ALONE else 1
    step = max(1, -(-size // threads))
    parts = [range(start, min(start + step, size)) for start in range(0, size, step)]
    return [*_team(threads).map(work, parts)] if threads > 1 else [*map(work, parts)]


@cache
def _team(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="aggregate")
