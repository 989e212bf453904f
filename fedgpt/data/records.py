"""Records of a file, one at a time, whatever the format.

{"who": "ann", "body": "..."}   a line of .jsonl, an object of .json, a row of .csv, .parquet
 -> Row(number=1, record={...}, problem="")          problem: why there is no record
 -> Field("corpus.text_field", "body").of(record)    the value that an option names
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fedgpt.core.errors import amount, nearest
from fedgpt.core.files import DIGITS, type_word
from fedgpt.data.reading import (
    PACKED,
    Unreadable,
    brief,
    lines,
    parquet_module,
    reason,
    text_chunks,
)

LARGEST = 32 << 20  # bytes of one record: a larger one is not read
PATH = re.compile(r"[^.\[\]]+(\[-?\d+\]|\.[^.\[\]]+)*")
STEP = re.compile(r"(?P<name>[^.\[\]]+)|\[(?P<index>-?\d+)\]")
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
NAME = re.compile(r"[\w.-]+( [\w.-]+)*")  # of a field, in the first row of most tables
FOR_EXCEL = re.compile(r'\s*"?sep=.?"?\s*', re.IGNORECASE)
SPACE = re.compile(r"[ \t\n\r]*")
MOST_NAMES = 5  # number of fields that a message names
OWNERS = ("file", "folder")  # values of corpus.client that need no field


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
            names = ", ".join(map(brief, islice(value, MOST_NAMES))) or "none"
            names += ", ..." if len(value) > MOST_NAMES else ""
            known = [name for name in islice(value, 1000) if len(name) <= 40]
            return f"{what}; its fields: {names}{nearest(str(step), known, 1)}"
        if isinstance(value, list):
            return f"{what} in a list of {len(value)}"
        return f"{what} in {type_word(value)}"


def twice_in(names: Sequence[str]) -> str:
    """Return the first name that stands twice, for a message; empty if none does."""
    if len(set(names)) == len(names):
        return ""
    return repr(brief(next(name for name, count in Counter(names).items() if count > 1)))


def format_of(name: str) -> Format | None:
    """Return the format of a file by its name; None if it has no records."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return None if suffix == ".parquet" != path.suffix else FORMATS.get(suffix)


def _json_lines(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    """Yield the objects of a file with one on each line; blank lines are only counted."""
    decoder = _Decoder(fields)
    for number, line in enumerate(lines(text_chunks(path), LARGEST), start=1):
        if _too_large(line):
            yield Row(number, {}, _TOO_LARGE)
        elif line and not line.isspace():
            yield _parsed(number, line, decoder)


def _json(path: Path, fields: Sequence[Field]) -> Iterator[Row]:
    """Yield the objects of a JSON array, or of a file with one object after the other.

    Raises Unreadable where the JSON is damaged, as no record after that place can be found.
    """
    objects = _Objects(text_chunks(path), fields)
    in_array = objects.take("[")
    number = 0
    while not (objects.take("]") if in_array else objects.at_end()):
        if number and in_array and not objects.take(","):
            raise Unreadable(objects.damaged("expected ',' or ']'"))
        number += 1
        yield objects.next(number)
    if not objects.at_end():
        raise Unreadable(objects.damaged("text after the end of the array"))


class _Objects:
    """Reads the JSON values of a text one by one, and holds only one of them."""

    def __init__(self, chunks: Iterator[str], fields: Sequence[Field]):
        self._chunks, self._decoder = chunks, _Decoder(fields)
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

    def next(self, number: int) -> Row:
        """Return the next value as a row; raises Unreadable if it is damaged or too large."""
        while True:
            self.at_end()
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return _row(number, value, self._decoder.twice)
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
                self._decoder = self._decoder.patient()

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
    """Yield the rows of a table in text; the first row has the names of the fields.

    Raises Unreadable where quotes are wrong in a way that rows may be inside a quoted value.
    """
    _check_separator(path, fields, separator)
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST))
    held: list[str] = []  # the lines of the current row
    rows = csv.reader(_noted(text_chunks(path), held), delimiter=separator, strict=True)
    names: list[str] = []
    while True:
        held.clear()
        number = rows.line_num + 1
        try:
            values = next(rows, None)
        except csv.Error as error:
            if len(held) > 1:
                raise Unreadable(
                    f"is not a table from line {number} on: a quoted value there has no end before"
                    f" line {rows.line_num} ({error}); {_QUOTES}"
                ) from error
            yield Row(number, {}, f"is not a row of a table ({error})")
            continue
        if values is None:
            return
        if not values:  # a blank line
            continue
        if _hold_rows(held, separator, len(names or values)):
            raise Unreadable(
                f"has a quoted value from line {number} to line {rows.line_num}, and most of these"
                f" lines look like rows of their own; {_QUOTES}, or save the table as .jsonl"
            )
        if not names:
            names = _header(values, number)
        else:
            yield _table_row(number, names, values)


_QUOTES = (
    'end each value that begins with a quote with a quote, and double ("") the quotes within, or'
    " remove all these quotes"
)


def _check_separator(path: Path, fields: Sequence[Field], separator: str) -> None:
    """Raise Unreadable if the names in the first row seem to have another separator: each row would
    be one value, with all of its fields in it.
    """
    rows = lines(text_chunks(path), LARGEST)
    first = next((line for line in rows if line and not line.isspace()), "")
    if FOR_EXCEL.fullmatch(first):
        raise Unreadable(
            f"begins with {brief(first)!r}, which tells Excel the separator of the table; save it"
            " without this line, with commas as .csv, or with tabs as .tsv"
        )
    asked = {name for field in fields for name in (field.typed, field.column)}
    for other in SEPARATORS if separator not in first else ():
        names = [name.strip('"') for name in first.split(other)]
        if len(names) > 1 and (asked.intersection(names) or all(map(NAME.fullmatch, names))):
            raise Unreadable(
                f"has {SEPARATORS[other]} between the names in its first row, {brief(first)!r}, and"
                f" is read with {SEPARATORS[separator]}; save it with commas as .csv, or with tabs"
                " as .tsv"
            )


def _noted(chunks: Iterator[str], held: list[str]) -> Iterator[str]:
    """Yield the lines of a text, and note each of them in `held`."""
    for line in lines(chunks, LARGEST):
        held.append(line)
        yield f"{line}\n"


def _hold_rows(held: Sequence[str], separator: str, count: int) -> bool:
    """Whether most lines of one row look like rows of `count` values, as a stray quote joins rows.

    In prose, addresses and code few lines have that number of separators, and a space or the end
    of the line follows most of them. Less than three separators in the joined rows may be chance.
    """
    if len(held) == 1:
        return False
    rows = [line.split(separator) for line in held if line.strip()]
    whole = sum(
        len(row) == count and all(value and not value[0].isspace() for value in row) for row in rows
    )
    return whole >= 0.75 * len(rows) and (whole - 1) * (count - 1) >= 3


def _header(values: list[str], number: int) -> list[str]:
    """Return the names of the fields; raises Unreadable if there are none or one stands twice."""
    if not any(values):
        raise Unreadable(f"has no names of fields in line {number}, its first row")
    if twice := twice_in(values):
        raise Unreadable(f"has two fields {twice} in line {number}, its first row")
    return values


def _table_row(number: int, names: list[str], values: list[str]) -> Row:
    """Return a row of a table as a record."""
    if len(values) != len(names):
        has, named = amount(len(values), "value"), amount(len(names), "field")
        return Row(number, {}, f"has {has}; the first row names {named}")
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
    if twice := twice_in([name for name in names if name in wanted]):
        raise Unreadable(f"has two columns {twice}; rename one of them")
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
    """A number with too many digits is read as text."""
    return int(digits) if len(digits) <= DIGITS else digits


class _Decoder(json.JSONDecoder):
    """Notes a needed name that stands twice in an object: only its last value would be read."""

    def __init__(self, fields: Sequence[Field], **options: Any):
        super().__init__(**options)
        self._fields, self.twice = fields, ""
        steps = {str(step) for field in fields for step in (field.typed, *field.steps)}
        self._quoted = [f'"{step}"' for step in steps]
        self._careful = json.JSONDecoder(object_pairs_hook=self._object, **options)  # slower

    def patient(self) -> _Decoder:
        """Return a slower one, for numbers with any number of digits."""
        return _Decoder(self._fields, parse_int=_long_integer)

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        """Return a value and where it ends; `decode` calls this as well."""
        value, end = super().raw_decode(s, idx)
        self.twice = ""
        for name in self._quoted:
            if s.count(name, idx, end) > 1:
                self._careful.raw_decode(s, idx)
                break
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self.twice = self.twice or twice_in(
                [name for name, _ in pairs if f'"{name}"' in self._quoted]
            )
        return found


def _parsed(number: int, line: str, decoder: _Decoder) -> Row:
    """Return the record of a line."""
    try:
        return _row(number, decoder.decode(line), decoder.twice)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"not JSON ({error.msg} at character {error.pos + 1})")
    except ValueError:  # a number with too many digits
        return _parsed(number, line, decoder.patient())
    except RecursionError:
        return Row(number, {}, _TOO_DEEP)


def _row(number: int, value: Any, twice: str) -> Row:
    """Return a value as a record, if it is an object in which no name stands twice."""
    if not isinstance(value, dict):
        problem = f"a record must be an object with fields, not {type_word(value)}"
        return Row(number, {}, problem)
    return Row(number, {}, f"has two fields {twice}") if twice else Row(number, value)


FORMATS = {
    ".jsonl": Format("line", _json_lines),
    ".ndjson": Format("line", _json_lines),
    ".json": Format("record", _json),
    ".csv": Format("line", _csv),
    ".tsv": Format("line", _tsv),
    ".parquet": Format("row", _parquet),
}
