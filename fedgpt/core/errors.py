"""Errors a user or an operator can act on."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path


class FedGPTError(Exception):
    """A failure with a message meant for the user: printed without a traceback."""


class ConfigError(FedGPTError):
    """One or more wrong options, told all at once.

    Each problem names the option as typed, its value, what is allowed and what to change.
    """

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} {noun} in the configuration:\n{listing}")


class Unwritten(FedGPTError):
    """A file of the run in `folder` that could not be written, most often as the disk is full."""

    def __init__(self, what: str, folder: Path, error: Exception):
        command = f"fedgpt run resume={shlex.quote(str(folder))}"
        super().__init__(
            f"could not write {what} in {folder}: {error}; make room and continue with: {command}"
        )


class StoppedEarly(FedGPTError):
    """A run that ended before its last version for a stated reason (exit code 3)."""


class Interrupted(FedGPTError):
    """SIGINT or SIGTERM: everything is on the disk and the run can be continued (exit code 130)."""

    def __init__(self, folder: str):
        super().__init__(f"interrupted; continue with: fedgpt run resume={shlex.quote(folder)}")


class UpdateRejected(Exception):
    """A client's reply that changes nothing, with a reason code from a closed set.

    `detail` holds names and numbers, never payload: it is written to logs.
    """

    def __init__(self, code: str, detail: str = ""):
        self.code, self.detail = code, detail
        super().__init__(f"{code}: {detail}" if detail else code)


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A `; did you mean ...` ending for an error about an unknown name, or an empty string."""
    names = list(known)
    close = [name for name in names if name.endswith(f".{word}")] or difflib.get_close_matches(
        word, names, count, 0.5
    )
    return f"; did you mean {' or '.join(repr(name) for name in close[:count])}?" if close else ""
