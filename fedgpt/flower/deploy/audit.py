"""The supervisor's lines in DIR/audit.jsonl, beside the link's refusals."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from fedgpt.core.files import PRIVATE
from fedgpt.flower.deploy.documents import now

AUDIT = "audit.jsonl"
log = logging.getLogger(__name__)
LONGEST = 2000  # characters of a reason


def note(folder: Path, act: str, reason: str = "", **about: Any) -> None:
    """Append a line: time, act, what it is about, and the reason if it has one.

    The file is opened for each line, because the link may rename it at any moment.
    """
    line = {"time": now(), "act": act, **about} | ({"reason": reason[:LONGEST]} if reason else {})
    try:
        handle = os.open(folder / AUDIT, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)
    except OSError as error:  # a full disk does not end the server
        log.warning("%s cannot be written: %s", folder / AUDIT, error.strerror)
