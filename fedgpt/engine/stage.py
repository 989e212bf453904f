"""The central evaluation stage beside the loop: a background thread scores a version while clients train the next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from fedgpt.core.options import EvaluateOptions

Record = dict[str, Any]


class Evaluator(Protocol):
    """Scores a flat vector; `sample` adds a text that the model wrote."""

    def __call__(self, version: int, params: np.ndarray, sample: bool) -> Record:
        """loss, perplexity, bits_per_byte, and prompt and sample where asked."""
        ...


class Stage:
    """At most one evaluation at a time; records are finished strictly in the order of versions."""

    def __init__(self, options: EvaluateOptions, rounds: int, evaluator: Evaluator, done: Callable[[Record], None]):
        self.options, self.rounds, self._evaluator, self._done = options, rounds, evaluator, done
        count = min(options.samples, rounds + 1)
        self.sampled = {round(v) for v in np.linspace(0, rounds, count)} if count > 1 else {rounds} if count else set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._running: Future[None] | None = None

    def due(self, version: int) -> bool:
        """Whether `version` is scored."""
        every = self.options.every
        return version in (0, self.rounds) or version in self.sampled or bool(every and version % every == 0)

    def finish(self, record: Record, params: np.ndarray) -> None:
        """Complete a version's record, with its scores if they are due, and hand it to `done`; returns at once."""
        self.wait()
        self._running = self._thread.submit(self._finish, record, params)

    def wait(self) -> None:
        """Return when the last record is done; raises what its evaluation raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread after its present work."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _finish(self, record: Record, params: np.ndarray) -> None:
        version = record["version"]
        scores = self._evaluator(version, params, version in self.sampled) if self.due(version) else {}
        self._done({**record, **scores})
