"""The owner, the text and the label in records, and the count of records that have none.

line 1  {"who": "ann", "text": "It rained."}   usable
line 2  {"who": "ann", "text": " "}            blank: left out and counted
line 3  {"who": "", "text": "It snowed."}      bad: refused, or left out with bad_records=skip
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from fedgpt.core.errors import amount
from fedgpt.core.files import type_word
from fedgpt.data.reading import Unreadable, brief
from fedgpt.data.records import Field, Format, Missing, Row, format_of
from fedgpt.data.sources import NAMED, LeftOut

MOST_BAD = 100  # so many bad records and no usable one mean that the options are wrong


@dataclass(frozen=True)
class RecordFields:
    """The fields that options name."""

    client: Field | None  # None: the owner is the file or its folder
    text: Field
    label: Field | None  # None: the label is the folder of the file

    def named(self) -> list[Field]:
        """Return all of them."""
        return [one for one in (self.client, self.text, self.label) if one is not None]


class TextRow(NamedTuple):
    """The text of one record; owner and label are None if no field gives them."""

    file: str
    id: str  # the place of the record, counted over all files
    client: str | None
    text: str
    label: str | None


class RecordText:
    """Reads files of records in the given order, as one corpus, and counts what is left out."""

    def __init__(self, fields: RecordFields, owner: str, skip: bool, direct: bool):
        """`owner` is corpus.client as typed; with `skip` bad records are left out; `direct` says
        that corpus.path names the only file.
        """
        self._fields, self._owner, self._skip, self._direct = fields, owner, skip, direct
        self._usable, self._blank, self._bad, self._mended = 0, 0, 0, 0
        self._blank_places: list[str] = []  # of the first blank records
        self._problems: list[str] = []  # of the first bad records
        self._told: list[str] = []

    def rows(self, files: Mapping[str, Path], left: LeftOut) -> Iterator[TextRow]:
        """Yield the text of each usable record; files without a record go to `left`.

        Raises Unreadable for a file that cannot be read, and, after the last record or after
        MOST_BAD, for bad records that are not to be left out.
        """
        before = 0  # number of lines, records or rows in earlier files
        for name, path in files.items():
            kind, number = format_of(name), 0
            assert kind is not None, "these are files of records"
            for number, record, problem in self._read(name, path, kind):
                place = f"{kind.unit} {number}"
                place = place if self._direct else f"{name}, {place}"
                if found := self._used(record, problem, place):
                    yield TextRow(name, f"{kind.unit} {before + number}", *found)
                elif self._bad == MOST_BAD and not self._usable:
                    raise Unreadable(self._refusal())
            before += number
            if not number:
                left.add("no records in it", name)
        if self._bad and not (self._skip and self._bad < self._usable):
            raise Unreadable(self._refusal())
        one_owner = self._fields.client is None and self._owner == "file" and len(files) == 1
        if one_owner and self._total:
            self._told.append(
                "corpus.client=file gives all records one owner; corpus.client=FIELD gives each"
                " record its own"
            )

    def notes(self) -> list[str]:
        """Return what was left out or changed, after the last of `rows`."""
        notes = list(self._told)
        if self._bad:
            notes.append(
                f"left out {self._bad:,} of {amount(self._total, 'record')} that cannot be used"
                f" (corpus.bad_records=skip): {self._examples}"
            )
        if self._blank:
            places = ", ".join(self._blank_places) + (", ..." if self._blank > NAMED else "")
            notes.append(
                f"left out {self._blank:,} of {amount(self._total, 'record')} whose text is blank:"
                f" {places}"
            )
        if self._mended:
            notes.append(
                f"in {amount(self._mended, 'record')} half a surrogate pair (\\ud800 to \\udfff)"
                " became U+FFFD"
            )
        return notes

    def _read(self, name: str, path: Path, kind: Format) -> Iterator[Row]:
        """Yield the rows of one file, whose name is in all that is raised."""
        try:
            yield from kind.read(path, self._fields.named())
        except Unreadable as error:
            raise Unreadable(f"{name} {error}") from error

    @property
    def _total(self) -> int:
        return self._usable + self._blank + self._bad

    @property
    def _examples(self) -> str:
        return " | ".join([*self._problems, *(["..."] if self._bad > NAMED else [])])

    def _used(
        self, record: dict[str, Any], problem: str, place: str
    ) -> tuple[str | None, str, str | None] | None:
        """Return owner, text and label of a record; None, and count it, if it is blank or bad."""
        problems = [problem] if problem else []
        client = text = label = None
        if not problem:
            if not self._total:
                self._choose_owner(record)
            fields = self._fields
            text = _text(record, fields.text, problems)
            client = fields.client and _client(record, fields.client, problems)
            label = fields.label and _label(record, fields.label, problems)
        if problems or text is None:
            self._bad += 1
            if len(self._problems) < NAMED:
                self._problems.append(f"{place}: {brief('; '.join(problems), 160)}")
            return None
        if not text.strip():
            self._blank += 1
            if len(self._blank_places) < NAMED:
                self._blank_places.append(place)
            return None
        self._usable += 1
        return self._encodable(client, text, label)

    def _encodable(
        self, client: str | None, text: str, label: str | None
    ) -> tuple[str | None, str, str | None]:
        """Return texts that can be encoded as UTF-8: JSON's escapes may leave half a pair."""
        try:
            for value in (client, text, label):
                (value or "").encode()
        except UnicodeEncodeError:
            self._mended += 1
            return (
                client and _without_half_pairs(client),
                _without_half_pairs(text),
                label and _without_half_pairs(label),
            )
        return client, text, label

    def _choose_owner(self, record: dict[str, Any]) -> None:
        """A field with the name `file` or `folder` is the owner's, if the records have one."""
        if self._fields.client is None and self._owner in record:
            self._fields = replace(self._fields, client=Field(self._owner))
            self._told.append(f"corpus.client={self._owner} is a field of the records here")

    def _refusal(self) -> str:
        """Return the problems of the first bad records, and what to do."""
        if not self._usable:
            which = f"the first {self._bad:,} records" if self._bad == MOST_BAD else "all records"
            return f"{which} cannot be used. {self._examples}"
        which = f"{self._bad:,} of {amount(self._total, 'record')} cannot be used"
        if self._skip:
            return (
                f"{which}, and corpus.bad_records=skip leaves out less than half. {self._examples}"
            )
        remedy = "mend them"
        if self._bad < self._usable:
            remedy += ", or leave them out with corpus.bad_records=skip"
        return f"{which}; {remedy}. {self._examples}"


def _value(record: dict[str, Any], option: str, field: Field, problems: list[str]) -> Any:
    """Return a field's value; None with a problem if it is missing, and None for NaN, which some
    programs write in place of null.
    """
    try:
        value = field.of(record)
        return None if isinstance(value, float) and isnan(value) else value
    except Missing as error:
        problems.append(f"{option}={field.typed}: {error}")
        return None


def _text(record: dict[str, Any], field: Field, problems: list[str]) -> str | None:
    before = len(problems)
    value = _value(record, "corpus.text_field", field, problems)
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if len(problems) == before:
        problems.append(f"corpus.text_field={field.typed}: is {type_word(value)}, not text")
    return None


def _client(record: dict[str, Any], field: Field, problems: list[str]) -> str | None:
    before = len(problems)
    value = _value(record, "corpus.client", field, problems)
    name = _name(value)
    if not (name and name.strip()) and len(problems) == before:
        wrong = type_word(value) if name is None else "empty"
        problems.append(f"corpus.client={field.typed}: is {wrong}; every record needs an owner")
    return name


def _label(record: dict[str, Any], field: Field, problems: list[str]) -> str:
    value = _value(record, "corpus.label_field", field, problems)
    name = "" if value is None else _name(value)
    if name is None:
        problems.append(f"corpus.label_field={field.typed}: is {type_word(value)}, not a label")
    return name or ""


def _name(value: Any) -> str | None:
    """Return the owner or label that a value names, in the way that JSON and tables write it;
    None for a value that names none.
    """
    if value is None or isinstance(value, list | dict | bytes):
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def _without_half_pairs(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
