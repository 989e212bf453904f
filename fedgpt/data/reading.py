"""The text of one file, read in parts, so that its size does not matter.

notes.txt.gz -> unpacked bytes -> UTF-8, line ends \\n -> text_chunks: parts of about 1 MiB
                                                       -> lines: lines of bounded length
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHUNK = 1 << 20  # bytes that are read at once
PACKED = (".gz", ".zst")
RECORDS_EXTRA = "python -m pip install 'fedgpt[records]'"
# how a file in UTF-16 or UTF-32 begins
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Unreadable(Exception):
    """The reason why a file cannot be read, in words that can follow its name."""


def shown(name: str | Path) -> str:
    """Return a file name that can be printed; bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def brief(text: str, most: int = 30) -> str:
    """Return a text of the user for a message: its beginning in one line, if it is long.

    >>> brief("a long name " * 1000)
    'a long name a long name a l...'
    """
    begin = text[: most + 1]
    begin = begin if begin.isprintable() else repr(begin)[1:-1]
    return begin if len(begin) <= most else f"{begin[: most - 3]}..."


def reason(error: BaseException) -> str:
    """Return the reason of an error of the system or of a library, in one line."""
    if isinstance(error, FileNotFoundError):
        return "is not there any more; the text changed while it was read"
    text = getattr(error, "strerror", None) or brief(" ".join(str(error).split()), 200)
    return f"cannot be read ({text or type(error).__name__})"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file's bytes, unpacked if its name ends in .gz or .zst.

    Raises Unreadable, also for errors of the system while the file is read.
    """
    packing = path.suffix.lower()
    try:
        if packing == ".gz":
            with gzip.open(path) as stream:
                yield stream  # pyright: ignore[reportReturnType]  # it has what IO[bytes] needs
        elif packing == ".zst":
            with _arrow("a .zst file").input_stream(str(path), compression="zstd") as stream:
                yield stream
        else:
            with path.open("rb") as stream:
                yield stream
    except (OSError, EOFError, zlib.error) as error:
        if packing not in PACKED or getattr(error, "errno", None):
            raise Unreadable(reason(error)) from error
        why = " ".join(str(error).split())
        raise Unreadable(f"cannot be unpacked ({why}); it is damaged or cut off") from error


def _arrow(what: str):
    """Import pyarrow; raises Unreadable with what to install."""
    try:
        import pyarrow
    except ImportError as error:
        raise Unreadable(
            f"is {what}, which needs the package pyarrow: run `{RECORDS_EXTRA}`"
        ) from error
    return pyarrow


def parquet_module():
    """Import pyarrow.parquet; raises Unreadable with what to install."""
    _arrow("a Parquet file")
    import pyarrow.parquet

    return pyarrow.parquet


def text_chunks(path: Path) -> Iterator[str]:
    r"""Yield the text of a UTF-8 file in parts, with line ends \n and without byte order mark.

    Raises Unreadable if it is not UTF-8, or if it has a NUL byte, which text has not.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    position, first, data = 0, True, b"-"  # position: number of bytes before `data`
    with opened(path) as stream:
        while data:
            data = stream.read(CHUNK)
            if not position:
                _check_mark(data)
            if (nul := data.find(b"\0")) >= 0:
                raise Unreadable(_has_nul(data, position + nul))
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise Unreadable(_not_utf8(error, position - pending, not data)) from error
            position += len(data)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text := line_ends.decode(text, final=not data):
                yield text


def is_text(path: Path) -> bool:
    """Whether all of a file is UTF-8 text; raises Unreadable if the system cannot read it."""
    try:
        for _ in text_chunks(path):
            pass
    except Unreadable as error:
        if isinstance(error.__cause__, OSError):
            raise
        return False
    return True


def lines(chunks: Iterable[str], most: int) -> Iterator[str]:
    """Yield the lines of a text without their ends.

    Of a line of more than `most` characters only the first `most` + 1 are yielded.
    """
    held: list[str] = []  # the parts of a line that has not ended
    length = 0
    for chunk in chunks:
        first, *others = chunk.split("\n")
        if length <= most:
            held.append(first[: most + 1 - length])
            length += len(held[-1])
        if others:
            yield "".join(held)
            yield from (line[: most + 1] for line in others[:-1])
            held, length = [others[-1][: most + 1]], min(len(others[-1]), most + 1)
    if length:
        yield "".join(held)


def _check_mark(data: bytes) -> None:
    """Raise Unreadable if a file begins as one in UTF-16 or UTF-32 does."""
    for mark, name in MARKS.items():
        if data.startswith(mark):
            raise Unreadable(f"is not UTF-8 but {name}; convert it (`iconv -f {name} -t UTF-8`)")


def _not_utf8(error: UnicodeDecodeError, offset: int, at_end: bool) -> str:
    """Return what is wrong with a file that is not UTF-8; `offset` is the place of its bytes."""
    byte = error.object[error.start]
    where = f"byte 0x{byte:02x} at position {offset + error.start:,}"
    if at_end:
        return f"is not UTF-8 at its end ({where}); it is cut off in the middle of a character"
    return (
        f"is not UTF-8 ({where}); convert it (`iconv -f ITS_ENCODING -t UTF-8`) or move it out of"
        " the folder"
    )


def _has_nul(data: bytes, position: int) -> str:
    """Return what is wrong with a file with a NUL byte; many of them mean UTF-16."""
    has = f"has a NUL byte at position {position:,}"
    if data.count(b"\0") > len(data) // 5:
        little = data[1::2].count(b"\0") >= data[0::2].count(b"\0")
        name = "UTF-16LE" if little else "UTF-16BE"
        return (
            f"{has} and many more, as text in UTF-16 has; convert it (`iconv -f {name} -t UTF-8`)"
        )
    return f"{has}, which text has not; remove such bytes (`tr -d '\\000'`)"
