"""`fedgpt` and `python -m fedgpt`: help is printed before large libraries are imported."""

from __future__ import annotations

import sys

from fedgpt import __version__
from fedgpt.cli import dispatch


def main() -> int:
    """Entry point of the command line; returns the exit code."""
    command, *arguments = sys.argv[1:] or ["help"]
    if "--version" in (command, *arguments):
        print(__version__)
        return 0
    if command in ("-h", "--help"):
        command, arguments = "help", []
    return dispatch(command, arguments)


if __name__ == "__main__":
    sys.exit(main())
