"""The parts of a server; fedgpt/assemble.py makes the parts of a real run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from fedgpt.aggregate.base import Strategy
from fedgpt.core.messages import Job, Update
from fedgpt.core.options import RunOptions
from fedgpt.core.score import LANGUAGE, Scoring
from fedgpt.core.transport import Transport
from fedgpt.server.privacy import Privacy
from fedgpt.simulate.fleet import Fleet
from fedgpt.storage.run_folder import RunFolder

RootTrainer = Callable[[Job], Update]


class Evaluator(Protocol):
    """Scores a flat vector."""

    def __call__(self, version: int, params: np.ndarray, sample: bool) -> dict[str, Any]:
        """Scores by name, including the run's score; with `sample`, also prompt and sample."""
        ...


@dataclass(frozen=True)
class Parts:
    """The parts of one run that the server uses and does not make."""

    options: RunOptions
    strategy: Strategy
    transport: Transport
    evaluator: Evaluator
    folder: RunFolder
    scoring: Scoring = LANGUAGE  # the names of the scores, and the run's score
    privacy: Privacy = field(default_factory=Privacy)
    root: RootTrainer | None = None  # trains the server's own update, for rules that need one
    fleet: Fleet | None = None  # modelled speeds of the clients on a real clock
