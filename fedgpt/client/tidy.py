"""What a site removes of its own files: what cannot be used any more, and what nobody uses.

    cache    prepared text of earlier states of the site's text, unless a private run is of it
    STATE    tokenizers and base weights that no run has used for a month; a server sends them again

Nothing else is removed: not the state of runs, which a run that goes on needs, and not the finished
models, which are the owner's. A file or folder with another name than those that this package gives
is left alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

KEEP_SECONDS = 30 * 24 * 3600.0  # for which a file stays that no run uses
ENTRY = re.compile(r"own-[0-9a-f]{16}")  # a cache entry with the text of a site
log = logging.getLogger(__name__)


def touch(path: Path) -> None:
    """Note that a file is in use."""
    with suppress(OSError):  # of another user, or on a disk that is full
        os.utime(path)


def remove_unused(files: Iterable[Path]) -> None:
    """Remove the files that were not touched for a month, and their folders if these are empty."""
    before = time.time() - KEEP_SECONDS
    for path in files:
        with suppress(OSError):  # another client of this site is faster, or the folder has more
            if path.stat().st_mtime < before:
                path.unlink()
                log.info("%s was not used for a month and is removed", path)
                path.parent.rmdir()


def remove_earlier(cache: Path, sha256: str, referred: set[str]) -> None:
    """Remove entries of a site's cache whose text is not the one with this digest.

    `referred` are the names of entries of which a private run is.
    """
    for folder in cache.iterdir() if cache.is_dir() else ():
        if not ENTRY.fullmatch(folder.name) or folder.name in referred:
            continue
        with suppress(OSError, ValueError, KeyError):  # not as it was written: it is made again
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            if manifest["sha256"] != sha256:
                shutil.rmtree(folder)
                (cache / f"{folder.name}.lock").unlink(missing_ok=True)
