"""Central evaluation in a background thread: it scores a version while clients train the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from fedgpt.core.messages import ServerState
from fedgpt.core.notices import saying
from fedgpt.core.options import EvaluateOptions
from fedgpt.server.parts import Evaluator
from fedgpt.storage.tables import VersionLine

Metrics = dict[str, Any]
# called with a complete metrics line, and with the weights if they were scored
Done = Callable[[Metrics, np.ndarray | None], None]


class BackgroundEvaluation:
    """At most one evaluation at a time; lines are completed strictly in the order of versions."""

    def __init__(self, options: EvaluateOptions, evaluator: Evaluator, done: Done):
        """`done` is called in the evaluation's thread."""
        self.options, self._evaluator, self._done = options, evaluator, done
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluate")
        self._pending: deque[Future[None]] = deque()

    def plan(self, line: VersionLine, before: float, after: float, every: int) -> VersionLine:
        """The line, with the decision whether to evaluate it; before and after: the run's progress,
        0 to 1.

        Samples are taken at equal intervals of progress, including the first and the last version.
        """
        version, samples = line.metrics["version"], self.options.samples
        intervals = samples - 1
        first = version == 0
        last = after >= 1
        passed = intervals > 0 and (
            first or math.floor(after * intervals) > math.floor(before * intervals)
        )
        sample = passed or (last and samples > 0)
        score = first or last or sample or bool(every and version % every == 0)
        return replace(line, score=score, sample=sample)

    def complete(self, line: VersionLine, params: np.ndarray) -> None:
        """Complete a version's line, with scores if it is evaluated, and pass it to `done`.

        Returns at once, unless an earlier version is still being scored and this version must also
        be scored. So at most one vector besides the current one is kept. Raises the exception of an
        evaluation that has ended, so that a task without its score stops the run at its beginning.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        if line.score:
            self.wait()
        scored = params if line.score else None
        self._pending.append(self._thread.submit(self._complete, line, scored))

    def scores(self, state: ServerState, sample: bool) -> Metrics:
        """Score a version and wait for the scores, because the next step depends on them."""
        self.wait()
        return self._evaluator(state.version, state.params, sample)

    def wait(self) -> None:
        """Return when all lines so far are complete; raises the exception of a failed
        evaluation.
        """
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread after its current evaluation."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _complete(self, line: VersionLine, params: np.ndarray | None) -> None:
        version, scores = line.metrics["version"], {}
        if params is not None:
            # later versions have lines before them
            with saying("scoring version 0") if version == 0 else nullcontext():
                scores = self._evaluator(version, params, line.sample)
        self._done({**line.metrics, **scores}, params)
