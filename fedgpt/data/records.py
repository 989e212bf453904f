"""Records of a file, one at a time, whatever the format.

{"who": "ann", "body": "..."}   a line of .jsonl, an object of .json, a row of .csv, .parquet
 -> Row(number=1, record={...}, problem="")          problem: why there is no record
 -> Field("corpus.text_field", "body").of(record)    the value that an option names
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fedgpt.core.errors import nearest
from fedgpt.data.reading import (
    PACKED,
    Unreadable,
    lines,
    parquet_module,
    reason,
    text_chunks,
)

LARGEST = 32 << 20  # bytes of one record: a larger one is not read
DIGITS = 4000  # a whole number with more digits is read as text, as Python refuses to convert it
PATH = re.compile(r"[^.\[\]]+(\[-?\d+\]|\.[^.\[\]]+)*")
STEP = re.compile(r"(?P<name>[^.\[\]]+)|\[(?P<index>-?\d+)\]")
SPACE = re.compile(r"[ \t\n\r]*")
OWNERS = ("file", "folder")  # values of corpus.client that need no field
WORDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
    bytes: "bytes without an encoding",
}


class Row(NamedTuple):
    """A record of a file, or the reason why it cannot be read."""

    number: int  # of the line, record or row, from 1
    record: dict[str, Any]  # empty if there is a problem
    problem: str = ""


class Format(NamedTuple):
    """A format of records."""

    unit: str  # what Row.number counts
    # (path, fields that are needed) -> the rows; raises Unreadable
    read: Callable[[Path, Sequence[Field]], Iterator[Row]]


class Missing(Exception):
    """A record has no value for a field; the message says what it has instead."""


@dataclass(frozen=True)
class Field:
    """A field of a record by its name, or by a path such as messages[1].content or data.text.

    >>> Field("messages[0].content").of({"messages": [{"content": "Dear Bob"}]})
    'Dear Bob'
    """

    typed: str

    @cached_property
    def steps(self) -> list[str | int]:
        """The names and list positions of a path; empty if it is none."""
        if not PATH.fullmatch(self.typed):
            return []
        return [match["name"] or int(match["index"]) for match in STEP.finditer(self.typed)]

    @property
    def column(self) -> str:
        """The name of the field at the top of the record."""
        return str(self.steps[0]) if self.steps else self.typed

    def of(self, record: dict[str, Any]) -> Any:
        """Return the field's value; a field with exactly this name comes before a path.

        Raises Missing.
        """
        if self.typed in record:
            return record[self.typed]
        value: Any = record
        for step in self.steps or [self.typed]:
            inside: Any = value if isinstance(value, dict | list) else {}
            try:
                value = inside[step]
            except (KeyError, IndexError, TypeError) as error:
                raise Missing(self._missing(value, step)) from error
        return value

    def _missing(self, value: Any, step: str | int) -> str:
        """Return what is there instead of `step`."""
        what = "no such field" if step == self.typed else f"no {step!r}"
        if isinstance(value, dict):
            names = ", ".join(map(str, value)) or "none"
            return f"{what}; its fields: {names}{nearest(str(step), value)}"
        if isinstance(value, list):
            return f"{what} in a list of {len(value)}"
        return f"{what} in {type_word(value)}"


def type_word(value: Any) -> str:
    """Return the type of a value in words of JSON.

    >>> type_word(None), type_word(3), type_word([])
    ('null', 'a number', 'a list')
    """
    return "null" if value is None else WORDS.get(type(value), f"a {type(value).__name__}")


def format_of(name: str) -> Format | None:
    """Return the format of a file by its name; None if it has no records."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return None if suffix == ".parquet" != path.suffix else FORMATS.get(suffix)


def _json_lines(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    """Yield the objects of a file with one on each line; blank lines are only counted."""
    for number, line in enumerate(lines(text_chunks(path), LARGEST), start=1):
        if _too_large(line):
            yield Row(number, {}, _TOO_LARGE)
        elif line and not line.isspace():
            yield _parsed(number, line)


def _json(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    """Yield the objects of a JSON array, or of a file with one object after the other.

    Raises Unreadable where the JSON is damaged, as no record after that place can be found.
    """
    objects = _Objects(text_chunks(path))
    in_array = objects.take("[")
    number = 0
    while not (objects.take("]") if in_array else objects.at_end()):
        if number and in_array and not objects.take(","):
            raise Unreadable(objects.damaged("expected ',' or ']'"))
        number += 1
        value = objects.next(number)
        if isinstance(value, dict):
            yield Row(number, value)
        else:
            yield Row(number, {}, _not_an_object(value))
    if not objects.at_end():
        raise Unreadable(objects.damaged("text after the end of the array"))


class _Objects:
    """Reads the JSON values of a text one by one, and holds only one of them."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks, self._decoder = chunks, _DECODER
        self._text, self._at = "", 0  # what is read but not used begins at _at
        self._lines = 0  # number of line ends before _text

    def at_end(self) -> bool:
        """Skip white space; whether nothing follows."""
        while True:
            self._at = _end(SPACE.match(self._text, self._at))
            if self._at < len(self._text):
                return False
            if not self._more():
                return True

    def take(self, mark: str) -> bool:
        """Skip white space and `mark`; whether it was there. Raises Unreadable at the end."""
        if self.at_end():
            if mark == "[":
                return False
            raise Unreadable(self.damaged("the end is missing"))
        found = self._text[self._at] == mark
        self._at += found
        return found

    def next(self, number: int) -> Any:
        """Return the next value; raises Unreadable if it is damaged or too large."""
        while True:
            self.at_end()
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                if _too_large(self._text[self._at :]):
                    raise Unreadable(
                        f"record {number} {_TOO_LARGE}, or the JSON is damaged"
                    ) from error
                if not self._more():
                    self._at = error.pos
                    raise Unreadable(self.damaged(error.msg)) from error
            except RecursionError as error:
                raise Unreadable(f"record {number} {_TOO_DEEP}") from error
            except ValueError:  # a number with too many digits
                self._decoder = _PATIENT

    def damaged(self, why: str) -> str:
        """Return a message with the line of the current place."""
        line = self._lines + self._text.count("\n", 0, self._at) + 1
        return f"is not JSON in line {line} ({why}); it is damaged or cut off"

    def _more(self) -> bool:
        """Read on, at least as much as is held, so that the work does not grow quadratically."""
        self._lines += self._text.count("\n", 0, self._at)
        held = [self._text[self._at :]]
        wanted, self._at = len(held[0]), 0
        for chunk in self._chunks:
            held.append(chunk)
            wanted -= len(chunk)
            if wanted <= 0:
                break
        self._text = "".join(held)
        return len(held) > 1


def _separated(path: Path, fields: Sequence[Field], separator: str) -> Iterator[Row]:
    """Yield the rows of a table in text; the first row has the names of the fields."""
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))
    ended = (f"{line}\n" for line in lines(text_chunks(path), LARGEST))
    rows = csv.reader(ended, delimiter=separator, strict=True)
    names: list[str] = []
    while True:
        number = rows.line_num + 1
        try:
            values = next(rows, None)
        except csv.Error as error:
            yield Row(number, {}, f"is not a row of a table ({error})")
            continue
        if values is None:
            return
        if not values:  # a blank line
            continue
        if not names:
            names = _header(values, number)
        else:
            yield _table_row(number, names, values)


def _header(values: list[str], number: int) -> list[str]:
    """Return the names of the fields; raises Unreadable if there are none or one stands twice."""
    if not any(values):
        raise Unreadable(f"has no names of fields in line {number}, its first row")
    if twice := [name for name in values if values.count(name) > 1]:
        raise Unreadable(f"has two fields {twice[0]!r} in line {number}, its first row")
    return values


def _table_row(number: int, names: list[str], values: list[str]) -> Row:
    """Return a row of a table as a record."""
    if len(values) != len(names):
        return Row(number, {}, f"has {len(values)} values; the first row names {len(names)} fields")
    if any(map(_too_large, values)):
        return Row(number, {}, _TOO_LARGE)
    return Row(number, dict(zip(names, values, strict=True)))


def _csv(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    yield from _separated(path, fields, ",")


def _tsv(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    yield from _separated(path, fields, "\t")


def _parquet(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    """Yield the rows of a Parquet file; only columns that are needed are read."""
    parquet = parquet_module()
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            columns = _columns(file.schema_arrow.names, fields)
            for batch in file.iter_batches(_rows_at_once(file.metadata), columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(number, record)
            expected = file.metadata.num_rows
    # pyarrow raises the last two for values that Python does not have, such as the year 10000
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise Unreadable(f"{reason(error)}; it is damaged, or no Parquet file") from error
    if number != expected:  # the numbers of rows have no checksum
        raise Unreadable(f"has {number:,} of {expected:,} rows; it is damaged")


def _columns(names: Sequence[str], fields: Sequence[Field]) -> list[str]:
    """Return the columns that are needed; all, which a message lists, if a field is missing."""
    wanted = {*OWNERS, *(field.typed for field in fields), *(field.column for field in fields)}
    if twice := [name for name in names if name in wanted and names.count(name) > 1]:
        raise Unreadable(f"has two columns {twice[0]!r}; rename one of them")
    complete = all(field.typed in names or field.column in names for field in fields)
    return [name for name in names if name in wanted or not complete]


def _rows_at_once(metadata: Any) -> int:
    """Return how many rows of a Parquet file take about 4 MiB."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max((g.total_byte_size // max(1, g.num_rows) for g in groups), default=1)
    return min(1024, max(1, (4 << 20) // max(1, largest)))


_TOO_LARGE = f"is larger than {LARGEST >> 20} MiB; put such a text into a .txt file"
_TOO_DEEP = "has too many lists or objects within each other"


def _too_large(text: str) -> bool:
    """Whether a text has more than LARGEST bytes."""
    return 4 * len(text) > LARGEST and (
        len(text) > LARGEST or len(text.encode(errors="replace")) > LARGEST
    )


def _end(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _long_integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= DIGITS else digits


_DECODER = json.JSONDecoder()
_PATIENT = json.JSONDecoder(parse_int=_long_integer)  # slower


def _parsed(number: int, line: str) -> Row:
    """Return the record of a line."""
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON ({error.msg} at character {error.pos + 1})")
    except ValueError:  # a number with too many digits
        value = _PATIENT.decode(line)
    except RecursionError:
        return Row(number, {}, _TOO_DEEP)
    return Row(number, value) if isinstance(value, dict) else Row(number, {}, _not_an_object(value))


def _not_an_object(value: Any) -> str:
    return f"a record must be an object with fields, not {type_word(value)}"


FORMATS = {
    ".jsonl": Format("line", _json_lines),
    ".ndjson": Format("line", _json_lines),
    ".json": Format("record", _json),
    ".csv": Format("line", _csv),
    ".tsv": Format("line", _tsv),
    ".parquet": Format("row", _parquet),
}
