"""Each change that a message about a text file advises is made, and the text is then read."""

from __future__ import annotations

import gzip
import os
import sys
from dataclasses import replace

import pytest
from support.advice import advises
from support.records import POSTS, jsonl, parquet, table, zst
from support.text import files, load, write

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.data import records
from fedgpt.data.prepare import prepare

WORDS = b"It rained.\n\nThen it snowed.\n"
PACKED = gzip.compress(WORDS, mtime=0)  # the same in every process that collects tests
ROWS = jsonl(POSTS)
TABLE = table(",")(POSTS)
LISTS = b'["ann", "It rained."]\n["bob", "It snowed."]\n'
PAGE = b"<!DOCTYPE html>\n<p>It rained.\n"
LONG = b'{"text": "' + b"word " * 400 + b'"}\n'
QUOTES_REMEDY = (
    'end each value that begins with a quote with a quote, and double ("") the quotes within, or'
    " remove all these quotes"
)
UNENDED = b'who,text\nann,"one\nbob,two\neve,three\n'
JOINED = b'who,text\nann,"one\nbob,two\neve,three\nann,four"\nbob,five\n'
# file, what it holds -> the advice, and the file and what it holds after that
FILE_REMEDIES = [
    ("a.txt", PACKED, "is packed with gzip; unpack it", "a.txt", WORDS),
    ("a.txt", PACKED, "is packed with gzip; unpack it", "a.txt.gz", None),
    ("a.txt", b"PK\x03\x04..", "is a zip archive; unpack it", "a.txt", WORDS),
    ("a.zip", b"PK\x03\x04..", "is not text; unpack it", "a.txt", WORDS),
    ("a.txt", b"%PDF-1.7", "is a PDF; convert it to plain text (.txt)", "a.txt", WORDS),
    ("a.txt", b"{\\rtf1 x}", "is RTF; convert it to plain text (.txt)", "a.txt", WORDS),
    ("a.html", PAGE, "is not text; convert it to plain text (.txt)", "a.txt", WORDS),
    ("a.txt", PAGE, "convert it to plain text (.txt), or fetch the file again", "a.txt", WORDS),
    ("a.jsonl", PAGE, "convert it to plain text (.txt), or fetch the file again", "a.jsonl", ROWS),
    ("a.txt", ROWS, "holds records; give it the suffix .json or .jsonl", "a.jsonl", None),
    ("a.txt", ROWS, "holds records; give it the suffix .json or .jsonl", "a.json", None),
    (
        "a.log",
        b"# of today\n" + ROWS,
        "give it the suffix .jsonl, and remove other lines",
        "a.jsonl",
        ROWS,
    ),
    *(
        ("a.txt", LISTS, "save them as a table (.csv) or as text", name, data)
        for name, data in {"a.csv": table(",")(POSTS), "a.txt": WORDS}.items()
    ),
    ("a.yaml", b"- text: words\n", "save its records as .jsonl or .csv", "a.jsonl", ROWS),
    (
        "a.yaml",
        b"- text: words\n",
        "save its records as .jsonl or .csv",
        "a.csv",
        table(",")(POSTS),
    ),
    *(
        ("a.csv", table(";")(POSTS), "save it with commas as .csv, or with tabs as .tsv", *after)
        for after in (("a.csv", table(",")(POSTS)), ("a.tsv", table("\t")(POSTS)))
    ),
    *(
        ("a.csv.txt", data, "rename it to a.csv, or to a.txt if it is text", *after)
        for data, after in {TABLE: ("a.csv", None), WORDS: ("a.txt", None)}.items()
    ),
    ("a.jsonlines", ROWS, "give it the suffix .jsonl", "a.jsonl", None),
    ("a.tab", table("\t")(POSTS), "give it the suffix .tsv", "a.tsv", None),
    ("a.txt.gzip", PACKED, "give it the suffix .gz, or unpack it", "a.txt.gz", None),
    ("a.txt.gzip", PACKED, "give it the suffix .gz, or unpack it", "a.txt", WORDS),
    ("a.jsonl.bak", ROWS, "rename it to a.jsonl", "a.jsonl", None),
    ("a.bin", b"\xff\xfe\xff", "convert it to a .txt file", "a.txt", WORDS),
    (os.fsdecode(b"f\xfcr.txt"), WORDS, "is not UTF-8; rename it", "für.txt", None),
    *(
        ("a.csv", UNENDED, QUOTES_REMEDY, "a.csv", UNENDED.replace(b'"one', value))
        for value in (b'"one"', b"one")
    ),
    *(
        ("a.csv", JOINED, f"{QUOTES_REMEDY}, or save the table as .jsonl", name, data)
        for name, data in {
            "a.csv": JOINED.replace(b'"', b""),
            "b.csv": JOINED.replace(b'"one', b'"one ""of"" five"').replace(b'four"', b"four"),
            "a.jsonl": ROWS,
        }.items()
    ),
    ("a.jsonl", LONG, "put such a text into a .txt file", "a.txt", WORDS),
]


@pytest.fixture
def _short_records(monkeypatch):
    """Records of more than a kilobyte are too large."""
    monkeypatch.setattr(records, "LARGEST", 1 << 10)


@pytest.mark.usefixtures("_short_records")
@pytest.mark.parametrize(("name", "data", "remedy", "after", "content"), FILE_REMEDIES)
def test_a_file_is_read_after_what_its_message_advises(
    tmp_path, name, data, remedy, after, content
):
    path = write(tmp_path, name, data)
    with pytest.raises(ConfigError) as refused:
        load(files(path))
    assert remedy in str(refused.value)
    path.unlink()
    assert load(files(write(tmp_path, after, data if content is None else content)))


def test_files_that_need_pyarrow_are_read_after_what_their_messages_advise(tmp_path):
    ZST_REMEDIES = [
        ("a.txt", zst(WORDS), "is packed with Zstandard; unpack it", "a.txt", WORDS),
        ("a.txt.zstd", zst(WORDS), "give it the suffix .zst, or unpack it", "a.txt.zst", None),
        ("a.txt", parquet(POSTS), "give it the suffix .parquet", "a.parquet", None),
    ]
    for row in ZST_REMEDIES:
        test_a_file_is_read_after_what_its_message_advises(tmp_path, *row)


OPTION_REMEDIES = [
    # files -> options, the advice, and the options after that
    (
        {"a.txt": WORDS},
        {"client": ""},
        "use file, folder or the name of a field of the records",
        [{"client": "file"}, {"client": "folder"}],
    ),
    (
        {"a.jsonl": ROWS},
        {"client": ""},
        "use file, folder or the name of a field of the records",
        [{"client": "who"}],
    ),
    ({"a.jsonl": ROWS}, {"text_field": ""}, "name the field with the text", [{}]),
    (
        {"a.txt": WORDS},
        {"client": "who"},
        "use corpus.client=file or corpus.client=folder",
        [{"client": "file"}, {"client": "folder"}],
    ),
    ({"a.txt": WORDS}, {"text_field": "body"}, "leave it out", [{}]),
    (
        {"a.txt": WORDS, "b.jsonl": ROWS},
        {"bad_records": "skip"},
        "leave it out, or read the records with corpus.path='FOLDER/*.jsonl'",
        [{}, {"bad_records": "skip", "path": "*.jsonl"}],
    ),
    (
        {"a.bin": b"\xff"},
        {},
        "name a folder with UTF-8 text or a file of records",
        [{"path": "text"}, {"path": "text/b.jsonl"}],
    ),
    (
        {"a.jsonl": ROWS + b'\n{"text": 5}\n'},
        {},
        "mend them, or leave them out with corpus.bad_records=skip",
        [{"bad_records": "skip"}],
    ),
    ({"a.jsonl": ROWS + b'\n{"text": 5}' * 3}, {}, "; mend them", [{"path": "text/b.jsonl"}]),
    (
        {},
        {"path": "nowhere"},
        "name a folder or file",
        [{"path": "text"}, {"path": "text/b.jsonl"}],
    ),
    (
        {},
        {"path": "nowhere*"},
        "name a folder, a file or a pattern",
        [{"path": "text"}, {"path": "text/a.txt"}, {"path": "text/*.jsonl"}],
    ),
]


@pytest.mark.parametrize(("given", "options", "remedy", "after"), OPTION_REMEDIES)
def test_files_are_read_with_the_options_that_their_message_advises(
    tmp_path, given, options, remedy, after
):
    for name, data in given.items():
        write(tmp_path / "given", name, data)
    write(tmp_path, "text/a.txt", WORDS)
    write(tmp_path, "text/b.jsonl", ROWS)

    def corpus(more: dict[str, str]) -> CorpusOptions:
        path = more.get("path", "")
        folder = tmp_path if path.startswith(("text", "nowhere")) else tmp_path / "given"
        return files(folder / path, **{k: v for k, v in more.items() if k != "path"})

    with pytest.raises(ConfigError) as refused:
        load(corpus(options))
    assert remedy in str(refused.value)
    for more in after:
        assert load(corpus(more))


def test_the_same_file_is_read_where_the_package_is_installed(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    path = write(tmp_path, "a.parquet", parquet(POSTS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError) as refused:
        load(files(path))
    advises(refused.value, "run `python -m pip install 'fedgpt[records]'`")
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    assert load(files(path))


def test_two_columns_are_read_after_one_of_them_has_another_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    words = pyarrow.array(["one", "two"])
    for names in (["text", "text"], ["text", "other"]):
        write_table(pyarrow.Table.from_arrays([words, words], names=names), tmp_path / "a.parquet")
        if names == ["text", "text"]:
            with pytest.raises(ConfigError) as refused:
                load(files(tmp_path))
            advises(refused.value, "rename one of them")
    assert len(load(files(tmp_path))) == 2


POINTERS = {
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 5\n",
    "git annex get": b"/annex/objects/SHA256E-s5--aaaa.txt\n",
}


@pytest.mark.parametrize("command", POINTERS)
def test_a_file_is_read_after_the_pointer_to_it_is_replaced(tmp_path, command):
    """As the command does, which needs the server with the file."""
    path = write(tmp_path, "a.txt", POINTERS[command])
    with pytest.raises(ConfigError) as refused:
        load(files(tmp_path))
    advises(refused.value, "the file itself is elsewhere; fetch it with")
    assert str(refused.value).endswith(f": {command}")
    path.write_bytes(WORDS)
    assert load(files(tmp_path))


def test_a_file_that_is_no_text_may_be_moved_out_of_the_folder(tmp_path):
    write(tmp_path, "text/a.txt", WORDS)
    path = write(tmp_path, "text/b.txt", "na\u00efve".encode("latin-1"))
    with pytest.raises(ConfigError) as refused:
        load(files(tmp_path / "text"))
    advises(
        refused.value,
        "convert it (`iconv -f ITS_ENCODING -t UTF-8`) or move it out of the folder",
    )
    path.rename(tmp_path / "b.txt")
    assert load(files(tmp_path / "text"))


def pages(first: int, last: int) -> bytes:
    return b"".join(
        b"It rained for %d days, and then it snowed.\n\n" % n for n in range(first, last)
    )


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({}, {"document_bytes": 64}),
        ({}, {"public": 0.0, "held_out": 0.5, "document_bytes": 1024}),
        ({"b.txt": pages(40, 800)}, {}),
    ],
)
def test_a_corpus_with_too_few_documents_is_enough_with_more_text_or_shorter_documents(
    tmp_path, more, less
):
    write(tmp_path, "text/a.txt", pages(0, 40))
    options = files(tmp_path / "text", document_bytes=4096, public=0.3, held_out=0.3)
    bytes_ = TokenizerOptions("bytes")
    with pytest.raises(ConfigError) as refused:
        prepare(options, bytes_, str(tmp_path / "cache"))
    advises(refused.value, "; add text or lower corpus.document_bytes")
    advises(refused.value, "add text or lower corpus.document_bytes, or lower the shares")
    for name, data in more.items():
        write(tmp_path / "text", name, data)
    prepare(replace(options, **less), bytes_, str(tmp_path / "cache"))


def test_the_public_part_of_a_corpus_trains_a_tokenizer_if_it_is_not_empty(tmp_path):
    write(tmp_path, "text/a.txt", pages(0, 99))
    options = files(tmp_path / "text", document_bytes=64, public=0.0)
    bpe, cache = TokenizerOptions("bpe", 300), str(tmp_path / "cache")
    with pytest.raises(ConfigError) as refused:
        prepare(options, bpe, cache)
    advises(refused.value, "raise it or use tokenizer=bytes")
    prepare(replace(options, public=0.2), bpe, cache)
    prepare(options, TokenizerOptions("bytes"), cache)
