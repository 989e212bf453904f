"""Records in every format that fedgpt reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from typing import Any

import pytest

Rows = list[dict[str, Any]]
POSTS: Rows = [
    {"who": "ann", "text": 'She said "yes", twice.\n\nThen, no.\n', "kind": "a"},
    {"who": "bob", "text": "line one\nline two, naïve 雪 \U0001f600", "kind": "b"},
    {"who": "ann", "text": "tab\there; semicolon", "kind": "a"},
]


def jsonl(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def table(separator: str) -> Callable[[Rows], bytes]:
    def made(rows: Rows) -> bytes:
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
        return stream.getvalue().encode()

    return made


def parquet(rows: Rows, **options: Any) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    stream = io.BytesIO()
    write_table(pyarrow.Table.from_pylist(rows), stream, **options)
    return stream.getvalue()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").Codec("zstd").compress(data, asbytes=True)


MAKERS: dict[str, Callable[[Rows], bytes]] = {
    ".jsonl": jsonl,
    ".ndjson": lambda rows: b"\xef\xbb\xbf" + jsonl(rows).replace(b"\n", b"\r\n"),
    ".json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    ".lines.json": jsonl,
    ".csv": table(","),
    ".tsv": table("\t"),
    ".parquet": parquet,
    ".jsonl.gz": lambda rows: gzip.compress(jsonl(rows)),
    ".jsonl.zst": lambda rows: zst(jsonl(rows)),
    ".csv.gz": lambda rows: gzip.compress(table(",")(rows)),
}
