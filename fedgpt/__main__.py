"""`fedgpt` and `python -m fedgpt`: help is printed before large libraries are imported."""

from __future__ import annotations

import os
import sys

from fedgpt import __version__
from fedgpt.cli import dispatch

# commands whose files only their owner may read: what is in a client's cache can be turned back
# into its text, and the folder of a server may be copied to where its own mode protects it no more
PRIVATE = ("client", "server")


def main() -> int:
    """Entry point of the command line; returns the exit code."""
    command, *arguments = sys.argv[1:] or ["help"]
    if "--version" in (command, *arguments):
        print(__version__)
        return 0
    if command in ("-h", "--help"):
        command, arguments = "help", []
    if command in PRIVATE:
        os.umask(0o077)
    try:
        return dispatch(command, arguments)
    except BrokenPipeError:  # the reader has what it wants, such as `head`
        # so that Python does not try to write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
