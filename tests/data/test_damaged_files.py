"""Damaged files of every format: the right text, or one message with the file's name.

What can be known of damage depends on the format:

- gzip has a checksum, and Zstandard and Parquet may have one: no damage gives other text.
- JSON and tables have a structure: what is read is what the damaged bytes say, as Python's own
  parsers read them. A changed letter in a text is just another text, and so is a file of lines
  that ends with an earlier line.
- Plain text has neither: what is read is the file's bytes, if they are UTF-8.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.records import MAKERS, POSTS, Rows, jsonl, parquet, zst
from support.text import files, load, notes, write

from fedgpt.core.errors import ConfigError

TEXTS = [str(row["text"]) for row in POSTS]
PROSE = "It rained.\n\nNaïve 雪 fell.\r\nThen, no.\n".encode()
# jsonl(POSTS) by `zstd --check -19`, as pyarrow writes no checksums
CHECKED_ZST = base64.b64decode(
    "KLUv/QRoRQQAMggaGHBvA6jXJ7CSVsi0WPulqjB6Tnsv/u8aHN+8Ip2G9Oin4+Tn5mutoUDAiNX1UESsLS3dWsTOlf00"
    "ndtf22Xz/gHXOuiS4eBdmXdMnJ2DVuQ0lS1DXS0rlA7Sjsikeq6ydXerxn6c1goLADOGBMuUAcu6wLlSILdcHfiQQhEQ"
    "xFbdI9ZkAgfLhy8="
)


# ---- what the bytes of a file say, in a way of our own; errors mean that they say nothing


def plain(data: bytes) -> list[str]:
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    return [text] if text.strip() else []


def texts_of(records: list[Any]) -> list[str]:
    """The texts that are not blank; every record must have an owner and a text.

    Half a surrogate pair becomes U+FFFD, and that is reported.
    """
    assert all(row["who"] for row in records)
    texts = [row["text"].replace("\r\n", "\n").replace("\r", "\n") for row in records]
    return [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in texts if text.strip()]


def lines(data: bytes) -> list[str]:
    text = "".join(plain(data))  # none in a byte order mark alone
    return texts_of([json.loads(line) for line in text.split("\n") if line.strip()])


def stream(data: bytes) -> list[str]:
    """One object after the other, with or without line ends."""
    rest, records = data.decode("utf-8-sig").strip(" \t\r\n"), []
    while rest:
        record, end = json.JSONDecoder().raw_decode(rest)
        records.append(record)
        rest = rest[end:].lstrip(" \t\r\n")
    return texts_of(records)


def array(data: bytes) -> list[str]:
    records = json.loads(data.decode("utf-8-sig"))
    return texts_of(records if isinstance(records, list) else [records])


def table(data: bytes, separator: str) -> list[str]:
    rows = csv.reader(io.StringIO(plain(data)[0], newline=""), delimiter=separator, strict=True)
    names, *rows = filter(None, rows)
    return texts_of([dict(zip(names, row, strict=True)) for row in rows])


UNDAMAGED = {
    ".txt": PROSE,
    ".md.gz": gzip.compress(PROSE[:20], mtime=0) + gzip.compress(PROSE[20:], mtime=0),
    ".rst.zst": lambda: zst(PROSE),
    **{suffix: lambda make=make: make(POSTS) for suffix, make in MAKERS.items()},
    ".checked.jsonl.zst": CHECKED_ZST,
    ".checked.parquet": lambda: parquet(POSTS, write_page_checksum=True, row_group_size=2),
    ".plain.parquet": lambda: parquet(
        POSTS, write_page_checksum=True, compression="none", use_dictionary=False
    ),
}
SAYS: dict[str, Callable[[bytes], list[str]]] = {
    ".txt": plain,
    ".jsonl": lines,
    ".ndjson": lines,
    ".lines.json": stream,
    ".json": array,
    ".csv": lambda data: table(data, ","),
    ".tsv": lambda data: table(data, "\t"),
}
UNCHECKED = {".rst.zst", ".jsonl.zst", ".parquet"}  # without a checksum: any text may come out


def undamaged(suffix: str) -> bytes:
    data = UNDAMAGED[suffix]
    return data if isinstance(data, bytes) else data()


def right(suffix: str) -> list[str]:
    return TEXTS if suffix in MAKERS or "checked" in suffix or "plain" in suffix else plain(PROSE)


def read(folder: Path, suffix: str, data: bytes) -> list[str] | None:
    """The texts of a damaged file beside a good one; None if it is refused by its name."""
    is_text = suffix.startswith((".txt", ".md", ".rst"))
    write(folder, f"a{suffix}", data)
    write(folder, "z.txt" if is_text else "z.jsonl", b"good" if is_text else jsonl(GOOD))
    options = files(folder, client="file" if is_text else "who", document_bytes=1 << 20)
    try:
        *texts, good = [document.text for document in load(options)]
    except ConfigError as error:
        [message] = error.problems
        assert f"a{suffix}" in message and "\n" not in message
        return None
    assert good == "good"
    if not texts:  # no text is left out in silence
        assert f"a{suffix}" in " ".join(notes(options)) or "blank" in " ".join(notes(options))
    return texts


GOOD: Rows = [{"who": "eve", "text": "good", "kind": "c"}]


# ---- damage


def flipped(data: bytes, places: list[int]) -> bytes:
    """The bytes with some bits changed."""
    changed = bytearray(data)
    for at in places:
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes that were cut, flipped, overwritten, lost, added or converted."""
    place = st.integers(0, len(data))
    bits = st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=3)
    few = st.binary(min_size=1, max_size=8)
    encoding = st.sampled_from(["utf-16", "utf-16-le", "utf-32-be", "latin-1"])
    return st.one_of(
        place.map(lambda at: data[:at]),
        bits.map(lambda places: flipped(data, places)),
        place.map(lambda at: data[:at] + bytes(len(data[at : at + 16])) + data[at + 16 :]),
        st.tuples(place, few).map(lambda cut: data[: cut[0]] + data[cut[0] + len(cut[1]) :]),
        st.tuples(place, few).map(lambda more: data[: more[0]] + more[1] + data[more[0] :]),
        few.map(lambda more: data + more),
        encoding.map(lambda name: data.decode("utf-8", "replace").encode(name, "replace")),
    )


@pytest.mark.parametrize("suffix", UNDAMAGED)
def test_an_undamaged_file_is_read(tmp_path, suffix):
    assert read(tmp_path, suffix, undamaged(suffix)) == right(suffix)


@pytest.mark.parametrize("suffix", UNDAMAGED)
def test_damage_is_reported_or_changes_nothing(tmp_path_factory, suffix):
    data, folder = undamaged(suffix), tmp_path_factory.mktemp("damaged")

    @settings(deadline=None, max_examples=100)
    @example(b"")
    @given(damaged(data))
    def check(changed: bytes) -> None:
        texts = read(folder, suffix, changed)
        if texts is None or suffix in UNCHECKED:
            return
        if suffix in SAYS:
            assert texts == (SAYS[suffix](changed) if changed else [])
        else:
            assert texts == right(suffix)

    check()


# ---- packed files

GZ = [
    (gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n", mtime=0), ""),
    (
        gzip.compress(b"one\n", mtime=0)
        + gzip.compress(b"", mtime=0)
        + gzip.compress(b"two\n", mtime=0),
        "",
    ),
    (gzip.compress(b"one\ntwo\n", mtime=0) + bytes(100), ""),  # zeros fill the last block of a tape
    (
        gzip.compress(b"one\n", mtime=0) + gzip.compress(b"two\n", mtime=0)[:-3],
        "cannot be unpacked",
    ),
    (gzip.compress(b"one\ntwo\n", mtime=0) + b"more", "cannot be unpacked"),
    (b"one\ntwo\n", "cannot be unpacked"),
    (b"", "is empty, which a packed file never is"),
]


@pytest.mark.parametrize(("data", "problem"), GZ)
def test_a_gzip_file_is_read_to_its_end(tmp_path, data, problem):
    check_packed(write(tmp_path, "a.txt.gz", data), problem)


def test_a_zstandard_file_is_read_to_its_end(tmp_path):
    one, two = zst(b"one\n"), zst(b"two\n")
    skipped = b"\x50\x2a\x4d\x18\4\0\0\0skip"  # a frame without text
    for data in (one + two, skipped + one + two, one + zst(b"") + two + skipped):
        check_packed(write(tmp_path, "a.txt.zst", data), "")
    for data in (one + two[:-2], one + two + b"more", one + two + bytes(100), b"one\ntwo\n"):
        check_packed(write(tmp_path, "a.txt.zst", data), "cannot be unpacked")
    check_packed(write(tmp_path, "a.txt.zst", b""), "is empty, which a packed file never is")


def check_packed(path: Path, problem: str) -> None:
    if problem:
        with pytest.raises(ConfigError, match=rf"{path.name} {problem}"):
            load(files(path))
    else:
        assert [document.text for document in load(files(path))] == ["one\ntwo\n"]


def test_an_empty_packed_file_among_others_is_refused(tmp_path):
    """It was left out in silence, as the libraries unpack nothing to nothing."""
    write(tmp_path, "a.txt", "text")
    write(tmp_path, "b.txt.gz", b"")
    with pytest.raises(ConfigError, match=r"b\.txt\.gz is empty"):
        load(files(tmp_path))


# ---- Parquet


def test_rows_that_a_damaged_parquet_file_does_not_count_are_missed(tmp_path):
    """The numbers of rows are in the footer, which has no checksum."""
    data = undamaged(".checked.parquet")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused = 0
    for at in range(footer, len(data) - 8):
        if data[at] in (2, 4, 6):  # 1, 2 and 3 in Thrift's compact protocol
            for number in {2, 4, 6} - {data[at]}:
                texts = read(tmp_path, ".parquet", data[:at] + bytes([number]) + data[at + 1 :])
                assert texts in (None, TEXTS)
                refused += texts is None
    assert refused > 10


def column(kind: str) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array(TEXTS)
    return {
        "large_string": texts.cast(pyarrow.large_string()),
        "dictionary": texts.dictionary_encode(),
        "nested": pyarrow.array([{"deep": [{"text": text}]} for text in TEXTS]),
        "bytes": texts.cast(pyarrow.binary()),
        "numbers": pyarrow.array([1, 2, 3]),
        "null": pyarrow.array([TEXTS[0], None, TEXTS[2]]),
        "all null": pyarrow.nulls(3),
        "not UTF-8": pyarrow.Array.from_buffers(
            pyarrow.string(), 3, pyarrow.array([b"\xff", b"b", b"c"]).buffers()
        ),
        "far date": pyarrow.array([2**62] * 3, pyarrow.timestamp("us")),
        "twice in a struct": pyarrow.StructArray.from_arrays([texts, texts], names=["a", "a"]),
    }[kind]


def parquet_column(folder: Path, kind: str, **options: Any) -> Path:
    data = column(kind)  # first, as it skips the test if pyarrow is missing
    from pyarrow import table as arrow_table
    from pyarrow.parquet import write_table

    write_table(arrow_table({"text": data}), folder / "a.parquet", **options)
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "nested"])
@pytest.mark.parametrize(
    "options",
    [{}, {"row_group_size": 1}, {"compression": "zstd", "data_page_version": "2.0"}],
    ids=str,
)
def test_texts_of_every_encoding_of_parquet_are_read(tmp_path, kind, options):
    path = parquet_column(tmp_path, kind, **options)
    field = "text.deep[0].text" if kind == "nested" else "text"
    assert [document.text for document in load(files(path, text_field=field))] == TEXTS


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("numbers", "row 1: corpus.text_field=text: is a number, not text"),
        ("bytes", "row 1: corpus.text_field=text: is bytes without an encoding, not text"),
        ("null", "1 of 3 records cannot be used; .*row 2: corpus.text_field=text: is null"),
        ("all null", "all records cannot be used.*row 1: corpus.text_field=text: is null"),
        ("nested", "row 1: corpus.text_field=text: is an object, not text"),
        ("not UTF-8", r"a\.parquet cannot be read \('utf-8' codec can't decode"),
        ("far date", r"a\.parquet cannot be read \(date value out of range"),
        ("twice in a struct", r"a\.parquet cannot be read \(.*duplicate field names"),
    ],
)
def test_a_column_without_texts_is_refused(tmp_path, kind, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        load(files(parquet_column(tmp_path, kind)))
    assert len(caught.value.problems) == 1


def test_two_columns_with_the_name_of_the_text_are_refused(tmp_path):
    """The texts of the second one were read, without a word of the first."""
    texts = column("large_string")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_arrays([texts, texts], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet has two columns 'text'; rename one of them"):
        load(files(tmp_path / "a.parquet"))
    write_table(
        Table.from_arrays([texts, texts, texts], names=["text", "n", "n"]), tmp_path / "a.parquet"
    )
    assert len(load(files(tmp_path / "a.parquet"))) == 3  # columns that are not read do no harm
