"""The fields of metrics.jsonl and events.jsonl from which the results of a run are made.

A resumed run keeps the records of its earlier versions, and at its end makes its summary and its
figures from all of them. So they are checked before it continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedgpt.core.errors import FedGPTError, resume_command
from fedgpt.storage.run_folder import RunFolder

Record = Mapping[str, Any]
Kinds = Mapping[str, Callable[[Any], bool]]  # name of a field -> whether a value may be its value


def _is_count(value: Any) -> bool:
    return isinstance(value, int)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_histogram(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and _is_count(count) for key, count in value.items()
    )


# the fields that are used, and what they are where they are not null
LINE_FIELDS: Kinds = {
    **dict.fromkeys(("version", "tokens", "bytes_up", "bytes_down"), _is_count),
    **dict.fromkeys(("accepted", "bases", "update_norm", "step_norm"), _is_number),
    **dict.fromkeys(("cosine", "step_correlation"), _is_number),
    **dict.fromkeys(("prompt", "sample"), _is_text),
    "staleness": _is_histogram,
}
EVENT_FIELDS: Kinds = {
    # earlier versions called the number of a job "task"
    **dict.fromkeys(("version", "tokens", "number", "task"), _is_count),
    **dict.fromkeys(("seconds", "train_seconds"), _is_number),
    **dict.fromkeys(("client", "pacing"), _is_text),
}
EVENT_ONLY = ("event", "seconds")  # fields of an event that a line of metrics does not have
# the fields that may not be missing: of every line, and of every event of a kind
LINE = ("version", "tokens", "bytes_up", "bytes_down")
SAMPLE = ("prompt", "sample")  # a line has both or neither
EVENTS: Mapping[str, Sequence[str]] = {
    "dispatch": ("client", "version", "seconds"),
    "accept": ("client", "tokens", "seconds"),
    "reject": ("client", "seconds"),
    "version": ("version", "seconds"),
    "pacing": ("pacing", "seconds"),
}


def check_records(
    folder: RunFolder, metrics: Sequence[Record], events: Sequence[Record], scores: Sequence[str]
) -> None:
    """Raise FedGPTError, naming file and line, if a field is missing or wrong.

    `metrics` and `events` are all records of the folder. `scores` are the names of the run's
    scores: a line of metrics.jsonl has all of them or none.
    """

    def of_line(line: Record) -> list[str]:
        groups = (group for group in (scores, SAMPLE) if any(name in line for name in group))
        return [*LINE, *(name for group in groups for name in group)]

    def of_event(event: Record) -> Sequence[str]:
        return EVENTS.get(str(event["event"]), ())

    line_fields = {**LINE_FIELDS, **dict.fromkeys(scores, _is_number)}
    for path, records, needed, fields in (
        (folder.metrics.path, metrics, of_line, line_fields),
        (folder.events.path, events, of_event, EVENT_FIELDS),
    ):
        for number, record in enumerate(records, 1):
            if problem := _problem(record, needed(record), fields):
                raise FedGPTError(
                    f"{path}: line {number} is damaged ({problem}); delete that line, and continue"
                    f" with: {resume_command(folder.path)}"
                )


def refuse_other_records(
    folder: RunFolder, version: Record, metrics: Sequence[Record], events: Sequence[Record]
) -> None:
    """Raise FedGPTError if metrics.jsonl or events.jsonl is that of another run.

    The metrics of each version are in both files, and those of the newest also in its checkpoint:
    `version`. Two runs differ at least in their seconds.
    """
    number = version["version"]
    steps = {e["version"]: e for e in events if e["event"] == "version"}
    path = folder.events.path
    if number in steps and (name := _other(version, steps[number])):
        where = f"{name!r} of version {number} differs from that in its newest checkpoint"
    else:
        path, lines = folder.metrics.path, {line["version"]: line for line in metrics}
        known = {**steps, number: version}
        where = next(
            (
                f"{name!r} of version {at} differs from that in {folder.events.path.name}"
                for at in sorted(known.keys() & lines.keys())
                if at <= number and (name := _other(known[at], lines[at]))
            ),
            "",
        )
    if where:
        raise FedGPTError(
            f"{path} is not that of this run: {where}; put the file of this run back, and continue"
            f" with: {resume_command(folder.path)}"
        )


def _other(one: Record, other: Record) -> str:
    """The first field that both records have, with different values; empty if there is none.

    Compared as text, in which a value that is not a number equals itself.
    """
    shared = (name for name in one if name in other and name not in EVENT_ONLY)
    return next((name for name in shared if json.dumps(one[name]) != json.dumps(other[name])), "")


def _problem(record: Record, needed: Sequence[str], fields: Kinds) -> str:
    """What is wrong with a record; empty where nothing is."""
    for name in needed:
        if record.get(name) is None:
            return f"it has no {name!r}"
    for name, value in record.items():
        if value is not None and name in fields and not fields[name](value):
            return f"{name!r} is {value!r:.40}"
    return ""
