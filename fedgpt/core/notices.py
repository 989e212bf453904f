"""What a command is doing, if that takes long, and warnings: lines on stderr, which no script
reads.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 1.0  # seconds without output after which a user wants to know what happens


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Print `fedgpt: what ...` on stderr if this block takes longer than PATIENCE.

    A block that ends sooner prints nothing, and stdout has the results alone.
    """
    # the stream of now, as a test may replace it before the timer ends
    line = {"file": sys.stderr, "flush": True}
    timer = threading.Timer(PATIENCE, print, [f"fedgpt: {what} ..."], line)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # so that no line comes after the block


class Warnings(logging.Handler):
    """Prints each warning of this package as a line that says whose it is."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `fedgpt: ...` on the stderr of now, as a test may replace it."""
        print(f"fedgpt: {self.format(record)}", file=sys.stderr, flush=True)
