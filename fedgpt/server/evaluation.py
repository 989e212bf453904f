"""The central evaluation stage beside the loop: a background thread scores a version while clients
train the next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.core.options import EvaluateOptions

Record = dict[str, Any]
# of a finished record, and of the weights where it has scores
Done = Callable[[Record, np.ndarray | None], None]


class Evaluator(Protocol):
    """Scores a flat vector; `sample` adds a text that the model wrote."""

    def __call__(self, version: int, params: np.ndarray, sample: bool) -> Record:
        """loss, perplexity, bits_per_byte, and prompt and sample where asked."""
        ...


class BackgroundEvaluation:
    """At most one evaluation at a time; records are finished strictly in the order of versions."""

    def __init__(self, options: EvaluateOptions, evaluator: Evaluator, done: Done):
        self.options, self._evaluator, self._done = options, evaluator, done
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._pending: deque[Future[None]] = deque()

    def plan(self, version: int, before: float, after: float, every: int) -> dict[str, bool]:
        """Whether a version is scored and sampled; `before` and `after` are the run's progress,
        from 0 to 1.

        Samples come at equal distances of progress, the first and the last version included.
        """
        intervals = self.options.samples - 1
        passed = intervals > 0 and (
            version == 0 or math.floor(after * intervals) > math.floor(before * intervals)
        )
        last = after >= 1
        sample = passed or (last and self.options.samples > 0)
        return {
            "score": version == 0 or last or sample or bool(every and version % every == 0),
            "sample": sample,
        }

    def finish(self, record: Record, params: np.ndarray, score: bool, sample: bool) -> None:
        """Complete a version's record, with its scores where it gets any, and hand it to `done`
        with what was scored.

        Returns at once unless an earlier version is still being scored and this one shall be, too:
        then only one vector besides the present one is ever held.
        """
        if score:
            self.wait()
        self._pending.append(
            self._thread.submit(self._finish, record, params if score else None, sample)
        )

    def scores(self, state: ServerState, score: bool, sample: bool) -> Record:
        """What a version scores, now: where the next step depends on it."""
        self.wait()
        return self._evaluator(state.version, state.params, sample) if score else {}

    def wait(self) -> None:
        """Return when all records so far are done; raises what an evaluation raised."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread after its present work."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _finish(self, record: Record, params: np.ndarray | None, sample: bool) -> None:
        scores = {} if params is None else self._evaluator(record["version"], params, sample)
        self._done({**record, **scores}, params)
