"""Texts of another machine in the logs, tables and files of this one."""

from __future__ import annotations


def one_line(text: str, most: int | None = None) -> str:
    """`text` without line breaks and control codes, cut to `most` characters.

    What another machine sends must not be able to control a terminal, or to add lines to a log.

    >>> one_line("no memory\\n  at\\x1b[2J step 3")
    'no memory at [2J step 3'
    """
    kept = text if most is None else text[:most]
    return " ".join("".join(c if c.isprintable() else " " for c in kept).split())
