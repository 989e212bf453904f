"""Files that are not what their names say, by how they begin; and files that only look like it."""

from __future__ import annotations

import gzip
import json

import pytest
from support.records import MAKERS, POSTS, jsonl, parquet, table, zst
from support.text import files, load, notes, write

from fedgpt.core.errors import ConfigError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 548105171\n"
ANNEX = b"/annex/objects/SHA256E-s548105171--aaaa.txt\n"
ANNEX_LINK = b"../.git/annex/objects/Mk/3w/SHA256E-s5--aaaa.txt/SHA256E-s5--aaaa.txt"
PAGE = b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n"
NAMES = [
    *("a.txt", "a.md", "a.rst", "a", "a.py", "a.txt.gz", "a.txt.zst"),
    *(f"a{suffix}" for suffix in MAKERS),
]


def refusal(folder, name: str, data: bytes) -> str:
    """The message about a file in a folder; empty if the file is read."""
    write(folder, name, data)
    try:
        load(files(folder, client="who" if name in map("a{}".format, MAKERS) else "file"))
    except ConfigError as error:
        [message] = error.problems
        assert name in message
        return message
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_a_pointer_to_a_file_elsewhere_is_refused_with_the_command_that_fetches_it(tmp_path, name):
    """A model would be trained on the pointer of a text, as if it were the text."""
    assert f"{name} is a Git LFS pointer" in refusal(tmp_path, name, LFS)
    assert refusal(tmp_path, name, LFS).endswith("fetch it with: git lfs pull")
    for pointer in (ANNEX, ANNEX_LINK):
        assert f"{name} is a git-annex pointer" in refusal(tmp_path, name, pointer)
        assert refusal(tmp_path, name, pointer).endswith("fetch it with: git annex get")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a.py"])
@pytest.mark.parametrize("up", ["", "../", "../../"])
def test_a_link_to_a_file_that_git_annex_has_not_fetched_is_refused(tmp_path, name, up):
    """A link to nothing is left out, and a data set that was fetched in part would train less."""
    folder = tmp_path / "text"
    write(folder, "b.txt", "text")
    (folder / name).symlink_to(f"{up}.git/annex/objects/Mk/3w/SHA256E-s5--aaaa.txt/SHA256E-s5")
    with pytest.raises(ConfigError, match=f"{name} is a git-annex pointer.*: git annex get$"):
        load(files(folder))
    (folder / name).rename(folder / "film.mp4")  # may be anything, so it is only named
    assert len(load(files(folder))) == 1
    assert notes(files(folder))[0].endswith("left out 1 file: film.mp4 (leads to nothing)")


@pytest.mark.parametrize(
    "page",
    [
        PAGE,
        b"\xef\xbb\xbf\r\n  <html lang=en>\n<p>Forbidden",
        b"<!doctype HTML PUBLIC>",
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.jsonl", "a.csv", "a.json"])
def test_a_web_page_in_place_of_text_or_records_is_refused(tmp_path, name, page):
    assert f"{name} is a web page or XML; convert it" in refusal(tmp_path, name, page)
    packed = f"{name}.gz"
    (tmp_path / name).unlink()
    assert f"{packed} is a web page or XML" in refusal(
        tmp_path, packed, gzip.compress(page, mtime=0)
    )


@pytest.mark.parametrize(
    "data",
    [
        jsonl(POSTS),
        json.dumps(POSTS).encode(),
        json.dumps(POSTS, indent=2).encode(),
        json.dumps(POSTS[0], indent=2).encode(),
        b'\n{"a \\" quote": ' + b"9" * 10_000,
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.rst", "a"])
def test_records_in_a_text_file_are_refused_and_the_remedy_reads_them(tmp_path, name, data):
    message = refusal(tmp_path, name, data)
    assert message.endswith(f"{name} holds records; give it the suffix .json or .jsonl")
    if data.endswith(b"9"):
        return
    (tmp_path / name).rename(tmp_path / "a.json")
    texts = [document.text for document in load(files(tmp_path))]
    assert texts == [row["text"] for row in POSTS][: len(texts)] != []


@pytest.mark.parametrize("before", [b"", b"# of today\n# by ann\n", b"Posts of today:\n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.log", "a.jl", "a.data", "a.txt.1"])
def test_records_on_lines_are_refused_under_any_name_of_text(tmp_path, name, before):
    if before or name not in ("a.txt", "a.md", "a"):
        for rows in (POSTS, [{"who": "ann", "text": "long " * 3000}] * 10):
            message = refusal(tmp_path, name, before + jsonl(rows))
            assert f"{name} holds records, one on each line; give it the suffix .jsonl" in message
    (tmp_path / name).unlink(missing_ok=True)
    write(tmp_path, "a.jsonl", jsonl(POSTS))
    assert len(load(files(tmp_path))) == 3  # the remedy


@pytest.mark.parametrize("before", [b"", b"# of today\n", b"Posts of today:\n\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.log", "a.txt.1", "a.txt.gz"])
def test_lists_in_json_on_lines_are_refused_under_any_name_of_text(tmp_path, name, before):
    """They were read as prose, although lines of objects were refused."""
    for rows in (
        [["ann", "It rained."]] * 2,
        [[]] * 2,
        [[1, ["deep"]]] * 9,
        [["long " * 3000]] * 9,
    ):
        data = before + b"\n".join(json.dumps(row).encode() for row in rows)
        message = refusal(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
        assert f"{name} holds lists in JSON, one on each line; save them as" in message


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (gzip.compress(b"words", mtime=0), "is packed with gzip; unpack it"),
        (b"PK\x03\x04....", "is a zip archive; unpack it"),
        (b"%PDF-1.7 \n", r"is a PDF; convert it to plain text (.txt)"),
        (b"{\\rtf1 words}", r"is RTF; convert it to plain text (.txt)"),
        (b"\x28\xb5\x2f\xfd....", "is packed with Zstandard; unpack it"),
        (b"PAR1.......PAR1", "is a Parquet file; give it the suffix .parquet"),
    ],
)
def test_data_under_the_name_of_a_text_is_refused_as_what_it_is(tmp_path, data, problem):
    """Some of these got advice to convert them from UTF-16."""
    for name in ("a.txt", "a.jsonl", "a.csv"):
        folder = tmp_path / name
        assert refusal(folder, name, data).endswith(f"{name} {problem}")
    assert problem in refusal(tmp_path / "twice", "a.txt.gz", gzip.compress(data, mtime=0))


def test_a_packed_parquet_file_is_refused_with_what_to_do(tmp_path):
    for name, pack in {"a.parquet.gz": gzip.compress, "a.parquet.zst": zst}.items():
        path = write(tmp_path, name, pack(parquet(POSTS)))
        with pytest.raises(ConfigError, match=rf"{name} is not text; unpack it"):
            load(files(path))


@pytest.mark.parametrize("inner", ["a.csv", "A.TSV"])
@pytest.mark.parametrize("suffix", [".txt", ".text", ".txt.gz"])
def test_a_table_under_the_name_of_a_text_is_refused(tmp_path, inner, suffix):
    data = table(",")(POSTS)
    data = gzip.compress(data) if suffix.endswith("gz") else data
    message = refusal(tmp_path, f"deep/{inner}{suffix}", data)
    assert f"{inner}{suffix} is a table by its name; rename it to {inner}, or to" in message


@pytest.mark.parametrize("name", ["csv.txt", "a.csv notes.txt", "a.csv.md", "a.csv.py", "a.c.txt"])
def test_a_name_with_other_parts_is_that_of_a_text(tmp_path, name):
    assert refusal(tmp_path, name, b"It rained, and then, it snowed") == ""


def contents() -> dict[str, bytes]:
    """What a file may hold."""
    kinds = {
        "prose": b"It rained.\n\nThen, no, it did not rain.\n",
        "jsonl": jsonl(POSTS),
        "json": json.dumps(POSTS).encode(),
        "csv": table(",")(POSTS),
        "tsv": table("\t")(POSTS),
        "parquet": parquet(POSTS),
        "jsonl.gz": gzip.compress(jsonl(POSTS)),
        "empty": b"",
    }
    encoded = {
        f"{kind} in {encoding}": kinds[kind].decode().encode(encoding, "replace")
        for kind in ("prose", "jsonl", "csv")
        for encoding in ("utf-16", "utf-16-be", "utf-32")
    }
    return kinds | encoded


# what a file with this name may hold; a table in a text file cannot be told from text
READ = {
    "a.txt": {"prose", "csv", "tsv"},
    "a.py": {"prose", "csv", "tsv", "json"},
    "a.jsonl": {"jsonl"},
    "a.json": {"json", "jsonl"},  # an array, or one object after the other
    "a.csv": {"csv"},
    "a.tsv": {"tsv"},
    "a.parquet": {"parquet"},
    "a.txt.gz": set(),
    "a.jsonl.gz": {"jsonl.gz"},
    "a.jsonl.zst": set(),
}


@pytest.mark.parametrize("name", READ)
def test_what_another_format_holds_is_refused(tmp_path, name):
    kinds = contents()
    assert {kind for kind in kinds if not refusal(tmp_path, name, kinds[kind])} == READ[name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "{ a set } of words"),
        ("a.txt", '["Hello," she said.] It rained.'),
        ("a.txt", '{"quoted"} words'),
        ("a.txt", "[1] A footnote"),
        ("a.txt", "[1] A footnote\n[2] And another"),
        ("a.md", "[a](b)\n[c](d)\n"),
        ("a.md", "[a]: b\n[c]: d\n"),
        ("a.txt", "[1]\n"),
        ("a.txt", "[1]\nis a footnote\n[2]\n"),
        ("a.py", "[1, 2]\n[3, x]\n"),
        ("a.txt", "[" * 1900 + "\n" + "[" * 1900),
        ("a.txt", "version https://example.org/spec"),
        ("a.txt", "/annexes/objects are words"),
        ("a.txt", "<p>A tag in words</p>"),
        ("a.md", "<h1 align=center>Title</h1>\n\nWords."),
        ("a.txt", "id,author,text\n0,ann,words\n"),
        ("a.txt", "PARIS, 1 May."),
        ("a.txt", "PKZIP is a program."),
        ("a.php", "<!DOCTYPE html>\n<?php words"),
        ("a.py", '{"a": 1}\n'),
        ("a.txt", "The file begins:\n<!DOCTYPE html>\n"),
        ("a.txt", 'The record is\n{"who": "ann"}\n'),
        ("a.txt", 'Two records:\n{"who": "ann"}\n{"who": "bob"}\nThat is all.\n'),
        ("a.md", '# Records\n\n```\n{"who": "ann"}\n{"who": "bob"}\n```\n'),
        ("a.js", '{"use strict": 1}\n{"a"; }\nf({"a": 1})\n'),
        ("a.py", '{\n    "name": "ann",\n    "depends": ["bob"],\n}\n'),
        ("a.js", 'var rows = [\n{"who": "ann"},\n{"who": "bob"}\n];\n'),
        ("a.rb", '# words\n{"who": 1}\n  .map { |x| x }\n'),
        ("a.log", '{"who": "ann"}\n'),
    ],
)
def test_text_that_only_looks_like_something_else_is_read(tmp_path, name, text):
    write(tmp_path, name, text)
    assert [document.text for document in load(files(tmp_path))] == [text]


def test_a_file_that_is_not_read_is_not_looked_at(tmp_path):
    write(tmp_path, "a.txt", "words")
    write(tmp_path, "b.jsonl", LFS)
    assert [document.text for document in load(files(tmp_path))] == ["words"]
