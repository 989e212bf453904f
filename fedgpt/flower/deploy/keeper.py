"""Runs a program for as long as its own standard input is open, and then ends all of its processes.

The other end of the input is in the hands of who started it alone, so that no program outlives
that process, however it ends. Flower's own watch on its parent may take 20 seconds, and takes a
dead parent that nobody waited for as alive; an old ServerApp would meanwhile hold the folder of the
run. If the keeper itself is killed, the kernel kills the program.
"""

from __future__ import annotations

import os
import select
import sys

from fedgpt.flower.processes import child, ends_with

POLL_SECONDS = 0.2  # between two looks whether the program still runs


def main(program: list[str]) -> int:
    """Run the program; returns its exit code."""
    with child(program, os.environ, log=None, first=ends_with(os.getpid())) as process:
        while process.poll() is None:
            if select.select([sys.stdin], [], [], POLL_SECONDS)[0] and not os.read(0, 1):
                break
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
