"""Errors that a user can act on, and the rejection of a client's update."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

# a number that no message shows as a whole; the name of a file has fewer characters
LONG_NUMBER = re.compile(r"\d{256,}")


class FedGPTError(Exception):
    """A failure whose message is meant for the user; it is printed without a traceback.

    >>> print(FedGPTError(f"rounds={'9' * 3000}: too many"))
    rounds=99999999999999999999... (3000 digits): too many
    """

    def __init__(self, message: str):
        super().__init__(without_long_numbers(message))

    exit_code = 1  # of the command that ends with it


class ConfigError(FedGPTError):
    """One or more wrong options, reported together.

    Each problem names the option as typed, its value, the allowed values and what to change.

    >>> print(ConfigError("rounds=0: must be at least 1"))
    1 problem in the configuration:
      - rounds=0: must be at least 1
    """

    exit_code = 2

    def __init__(self, problems: Iterable[str] | str):
        listed = [problems] if isinstance(problems, str) else problems
        self.problems = [without_long_numbers(problem) for problem in listed]
        noun = "problem" if len(self.problems) == 1 else "problems"
        listing = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} {noun} in the configuration:\n{listing}")


CONTINUES_WITH = "FEDGPT_CONTINUES_WITH"
# error numbers of a full disk
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def resume_command(folder: str | Path) -> str:
    """The command that continues the run in a folder, as it is typed in a shell.

    It begins as the environment variable CONTINUES_WITH says, because the run of a server's folder
    is continued there.

    >>> resume_command("runs/my run")
    "fedgpt run resume='runs/my run'"
    """
    command = os.environ.get(CONTINUES_WITH, "fedgpt run")
    return f"{command} resume={shlex.quote(str(folder))}"


class Unwritten(FedGPTError):
    """A file of the run in `folder` could not be written, usually because the disk is full.

    Otherwise it cannot be read either, as a folder that has the file's name.
    """

    def __init__(self, what: str, folder: Path, error: Exception):
        full = not isinstance(error, OSError) or error.errno in FULL
        verb, remedy = ("write", "make room") if full else ("read or write", "remove the cause")
        super().__init__(
            f"could not {verb} {what} in {folder}: {error}; {remedy} and continue with:"
            f" {resume_command(folder)}"
        )


class ForServer(FedGPTError):
    """A client's failure whose message says nothing of its text, its machine or its files.

    So the server may read it, whatever the run promises.
    """


class PartMissing(ForServer):
    """A client lacks the run's tokenizer or its base weights, which the server can send again."""


class DiskFull(FedGPTError):
    """A client's disk, or its share of one, is full. Servers see the name of this class."""


class StoppedEarly(FedGPTError):
    """The run ended before its last version, for the reason in the message."""

    exit_code = 3


class TextChanged(FedGPTError):
    """The prepared text of a process is not the text that the run began with."""


class Interrupted(FedGPTError):
    """The run got SIGINT or SIGTERM, is saved, and can be continued."""

    exit_code = 130

    def __init__(self, folder: str):
        super().__init__(f"interrupted; continue with: {resume_command(folder)}")


class UpdateRejected(Exception):
    """A client's update is rejected, for the reason in `code`.

    Metrics count the rejections of each code. `detail` is logged, so it contains only names and
    numbers, not the client's data.
    """

    def __init__(self, code: str, detail: str = ""):
        self.code, self.detail = code, detail
        super().__init__(f"{code}: {detail}" if detail else code)


def without_long_numbers(text: str) -> str:
    """The text with the first digits and the length of each number of hundreds of digits."""
    return LONG_NUMBER.sub(lambda found: f"{found[0][:20]}... ({len(found[0])} digits)", text)


def amount(number: int, noun: str) -> str:
    """A number of things.

    >>> amount(1, "client"), amount(1200, "client")
    ('1 client', '1,200 clients')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an error message about an unknown name: similar known names, or nothing.

    >>> nearest("fedavgm", ["fedavg", "fedadam", "krum"], count=1)
    "; did you mean 'fedavg'?"
    """
    names = list(known)
    close = [name for name in names if name.endswith(f".{word}")] or difflib.get_close_matches(
        word, names, count
    )
    return f"; did you mean {' or '.join(repr(name) for name in close[:count])}?" if close else ""
