"""How a file begins, where that shows that it is not what its name says.

notes.txt     version https://git-lfs...    a pointer: the file itself was not fetched
posts.jsonl   <!DOCTYPE html>               a web page, such as the error page of a download
notes.txt     {"who": "ann", "text": ...    records: a model would learn their syntax
notes.log     {"who": ...\n{"who": ...      records, as no source code has two such lines
notes.txt     ["ann", ...]\n["bob", ...]     rows of a table, without the names of the fields

Only what no text of this kind begins with is refused. A table in a .txt file is noticed only by a
name such as posts.csv.txt: its first row can be the first line of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fedgpt.core.files import pointer_problem
from fedgpt.data.reading import PACKED, Unreadable, opened, reason
from fedgpt.data.records import format_of
from fedgpt.data.sources import TEXT_SUFFIXES, stem_of, suffix_of

READ = 1 << 16  # bytes
PLAIN, TABLES = (".txt", ".text"), (".csv", ".tsv")  # a.csv.md may be a page about a.csv
# what is not text, by its first bytes
DATA = {
    b"\x1f\x8b\x08": "is packed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "is packed with Zstandard; unpack it",
    b"PK\x03\x04": "is a zip archive; unpack it",
    b"PAR1": "is a Parquet file; give it the suffix .parquet",
    b"%PDF-": "is a PDF; convert it to plain text (.txt)",
    b"{\\rtf": "is RTF; convert it to plain text (.txt)",
}
PAGE = re.compile(r"<(!doctype|html|\?xml)\b", re.IGNORECASE)
RECORD = re.compile(r'\[?\s*\{\s*"([^"\\]|\\.)*"\s*:')  # {"who": or [{"who":
RECORD_LINE = re.compile(RECORD.pattern + r".*\},?\s*")


def check_beginning(name: str, path: Path) -> None:
    """Raise Unreadable, with the file's name, if the file is not what its name says."""
    try:
        begin = _begin(path)
        problem = pointer_problem(begin)
        if not problem and suffix_of(name) != ".parquet":
            problem = _problem(name, _unpacked(path, begin))
        if problem:
            raise Unreadable(problem)
    except Unreadable as error:
        raise Unreadable(f"{name} {error}") from error


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(READ)
    except OSError as error:
        raise Unreadable(reason(error)) from error


def _unpacked(path: Path, begin: bytes) -> bytes:
    """Return the first bytes of what a file holds; `begin` are the first of the file."""
    if path.suffix.lower() not in PACKED:
        return begin
    if not begin:  # the libraries unpack nothing to nothing
        raise Unreadable("is empty, which a packed file never is; it is damaged or cut off")
    with opened(path) as stream:
        return stream.read(READ)


def _problem(name: str, begin: bytes) -> str:
    """Return what a file is that begins so, and what to do; empty if it may be what it says."""
    for data, problem in DATA.items():
        if begin.startswith(data):
            return problem
    text = begin.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    is_text = suffix_of(name) in TEXT_SUFFIXES
    if (is_text or format_of(name)) and PAGE.match(text):
        return "is a web page or XML; convert it to plain text (.txt), or fetch the file again"
    if is_text and RECORD.match(text):
        return "holds records; give it the suffix .json or .jsonl"
    if suffix_of(name) in PLAIN and suffix_of(inner := Path(stem_of(name)).name) in TABLES:
        plain = f"{Path(inner).stem}.txt"
        return f"is a table by its name; rename it to {inner}, or to {plain} if it is text"
    return "" if format_of(name) else _problem_of_lines(_lines(text, whole=len(begin) < READ))


def _problem_of_lines(lines: Sequence[str]) -> str:
    if _are(lines, lambda line: RECORD_LINE.fullmatch(line) is not None):
        return "holds records, one on each line; give it the suffix .jsonl, and remove other lines"
    if _are(lines, _is_list):
        return "holds lists in JSON, one on each line; save them as a table (.csv) or as text"
    return ""


def _lines(text: str, whole: bool) -> list[str]:
    """The lines of a text that are not blank, after the comments at its beginning."""
    found = [line for line in text.split("\n") if line.strip()]
    found = found if whole else found[:-1]  # the last line may be cut off
    while found and found[0].startswith(("#", "//")):
        del found[0]
    return found


def _are(lines: Sequence[str], is_one: Callable[[str], bool]) -> bool:
    """Whether at least two lines are such, and at most one other comes before."""
    lines = lines[1:] if lines and not is_one(lines[0]) else lines
    return len(lines) > 1 and all(map(is_one, lines))


def _is_list(line: str) -> bool:
    """Whether a line is a list in JSON."""
    try:
        return line.lstrip().startswith("[") and isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False
