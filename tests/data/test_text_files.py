"""corpus=files: which files are read, who owns their text, and which are left out by name."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from support.advice import advises
from support.text import files, load, notes, write
from support.users import become_nobody, folder_of_root

from fedgpt.core.errors import ConfigError
from fedgpt.data import reading


def owners(path: Path, client: str = "file") -> set[str]:
    return {document.client for document in load(files(path, client=client))}


# ---- links


def test_linked_folders_are_read_once_and_a_link_to_the_folder_itself_ends(tmp_path):
    corpus = tmp_path / "corpus"
    write(corpus, "p/a.txt", "one")
    write(tmp_path, "elsewhere/b.txt", "two")
    (corpus / "q").symlink_to(tmp_path / "elsewhere")
    (corpus / "loop").symlink_to(corpus)
    (corpus / "q" / "back").symlink_to(corpus / "p")
    assert owners(corpus, "folder") == {"p", "q"}
    assert notes(files(corpus)) == [
        f"corpus.path={corpus}: left out 2 files: loop, q/back (a link to what is read anyway)"
    ]


@pytest.mark.parametrize("link", ["a.txt", "z.txt"])  # before and after the file
@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
def test_a_link_to_a_text_makes_no_second_client(tmp_path, link, kind):
    write(tmp_path, "m.txt", "the only text")
    getattr(tmp_path / link, kind)(tmp_path / "m.txt")
    documents = load(files(tmp_path))
    assert len(documents) == 1
    if kind == "symlink_to":  # hard links are equal, and the first name is the client's
        assert documents[0].client == "m"
    [note] = notes(files(tmp_path))
    assert "a link to what is read anyway" in note


def test_a_link_to_a_text_elsewhere_is_a_client(tmp_path):
    write(tmp_path, "elsewhere/ann.txt", "hers")
    corpus = tmp_path / "corpus"
    write(corpus, "bob.txt", "his")
    (corpus / "ann.txt").symlink_to(tmp_path / "elsewhere" / "ann.txt")
    assert owners(corpus) == {"ann", "bob"} and notes(files(corpus)) == []


def test_links_to_nothing_and_pipes_are_reported_and_never_opened(tmp_path):
    write(tmp_path, "a.txt", "text")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert owners(tmp_path) == {"a"}
    printed = "\n".join(notes(files(tmp_path)))
    assert "left out 2 files: gone.txt, self.txt (leads to nothing)" in printed
    assert "left out 1 file: pipe.txt (a pipe, socket or device)" in printed
    with pytest.raises(ConfigError, match=r"pipe\.txt: is neither a folder nor a file"):
        load(files(tmp_path / "pipe.txt"))


# ---- kinds of files


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("page.html", "convert it to plain text"),
        ("page.XML", "convert it to plain text"),
        ("paper.pdf", "convert it to plain text"),
        ("settings.yaml", r"save its records as \.jsonl or \.csv"),
        ("table.xlsx", r"save its records as \.jsonl or \.csv"),
        ("notes.zip", "unpack it"),
        ("notes.tar.gz", "unpack it"),
        ("posts.jsonl.zstd", r"give it the suffix \.zst, or unpack it"),
        ("notes.txt.gzip", r"give it the suffix \.gz, or unpack it"),
        ("posts.jsonlines", r"give it the suffix \.jsonl"),
        ("posts.LDJSON.gz", r"give it the suffix \.jsonl"),
        ("posts.tab", r"give it the suffix \.tsv"),
        ("posts.psv", r"save its records as \.jsonl"),
        ("map.geojson", r"save its records as \.jsonl"),
        ("posts.jsonl.bak", r"rename it to posts\.jsonl"),
        ("posts.CSV~", r"rename it to posts\.CSV"),
        ("posts.json.gz.1", r"rename it to posts\.json\.gz"),
        ("page.html.old", "convert it to plain text"),
        ("posts.parquet.gz", "unpack it"),
    ],
)
def test_what_is_no_text_is_refused_by_name_and_left_out_of_a_folder(tmp_path, name, remedy):
    write(tmp_path, name, "<b>words</b>")
    with pytest.raises(ConfigError, match=rf"{name} is not text; {remedy}"):
        load(files(tmp_path / name))
    with pytest.raises(ConfigError, match=rf"contains no text.*left out 1 file: {name} \(not"):
        load(files(tmp_path))
    write(tmp_path, "a.txt", "text")
    assert owners(tmp_path) == {"a"}
    assert notes(files(tmp_path)) == [f"corpus.path={tmp_path}: left out 1 file: {name} (not text)"]


@pytest.mark.parametrize("name", ["notes.txt.bak", "book.1", "parse.json.py", "v1.2", "a.csv.md"])
def test_a_text_whose_name_only_looks_like_a_copy_of_records_is_read(tmp_path, name):
    write(tmp_path, name, "text")
    assert len(load(files(tmp_path))) == 1


def test_source_code_is_text_and_a_binary_file_is_not(tmp_path):
    write(tmp_path, "a.py", "x = 1\n")
    write(tmp_path, "b.bin", b"x" * (1 << 20) + b"\xff")  # the wrong byte comes late
    assert owners(tmp_path) == {"a"}
    with pytest.raises(ConfigError, match=r"b\.bin is not text in UTF-8"):
        load(files(tmp_path / "b.bin"))


def test_hidden_files_are_read_only_if_they_are_named(tmp_path):
    write(tmp_path, ".hidden.txt", "hidden")
    write(tmp_path, "a.txt", "text")
    assert owners(tmp_path) == {"a"}
    assert [document.text for document in load(files(tmp_path / ".hidden.txt"))] == ["hidden"]


@pytest.mark.parametrize("pattern", ["*.txt", "**/*.txt", "n[ao]tes/*.txt", "notes/?.txt"])
def test_a_pattern_names_files(tmp_path, pattern):
    write(tmp_path, "notes/a.txt", "text")
    write(tmp_path, "notes/b.jsonl", '{"text": "record"}')
    if pattern == "*.txt":
        with pytest.raises(ConfigError, match=r"\*\.txt: no file has such a name"):
            load(files(tmp_path / pattern))
    else:
        assert [document.text for document in load(files(tmp_path / pattern))] == ["text"]
    assert [d.text for d in load(files(tmp_path / "notes" / "*.jsonl"))] == ["record"]


def test_a_folder_whose_name_looks_like_a_pattern_is_that_folder(tmp_path):
    write(tmp_path, "notes[1]/a.txt", "text")
    assert owners(tmp_path / "notes[1]") == {"a"}


# ---- names, encodings, permissions


def test_a_name_that_is_not_utf8_is_refused_with_escapes(tmp_path):
    for name in (b"M\xfcller.txt", b"f\xfcr/a.txt"):
        folder = tmp_path / str(len(name))
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True)
        try:
            path.write_text("text")
        except OSError:
            pytest.skip("this file system has only names in UTF-8")
        with pytest.raises(ConfigError, match=r"the name of \S*\\xfc\S* is not UTF-8; rename it"):
            load(files(folder))
    with pytest.raises(ConfigError, match=r"\\xfc: does not exist"):
        load(files(tmp_path / os.fsdecode(b"\xfc")))


CONVERTED = {
    "old.txt": ("naïve".encode("latin-1"), "is not UTF-8 (byte 0xef at position 2)"),
    "utf16.txt": ("naïve".encode("utf-16"), "is not UTF-8 but UTF-16"),
    "utf32.txt": ("naïve".encode("utf-32"), "is not UTF-8 but UTF-32"),
    "little.txt": (b"n\0a\0i\0", "has a NUL byte at position 1 and many more"),
    "big.txt": (b"\0n\0a\0i", "has a NUL byte at position 0 and many more"),
    "nul.txt": (b"words\0 and words", "has a NUL byte at position 5"),
}


CONVERT_REMEDIES = {
    "old.txt": "convert it (`iconv -f ITS_ENCODING -t UTF-8`) or move it out of the folder",
    "utf16.txt": "convert it (`iconv -f UTF-16 -t UTF-8`)",
    "utf32.txt": "convert it (`iconv -f UTF-32 -t UTF-8`)",
    "little.txt": "convert it (`iconv -f UTF-16LE -t UTF-8`)",
    "big.txt": "convert it (`iconv -f UTF-16BE -t UTF-8`)",
    "nul.txt": "remove such bytes (`tr -d '\\000'`)",
}


@pytest.mark.parametrize("name", CONVERTED)
def test_the_remedy_for_another_encoding_makes_a_text_that_is_read(tmp_path, name):
    data, problem = CONVERTED[name]
    write(tmp_path, name, data)
    with pytest.raises(ConfigError) as caught:
        load(files(tmp_path))
    message = str(caught.value)
    assert f"corpus.path={tmp_path}: {name} {problem}" in message
    advises(message, CONVERT_REMEDIES[name])
    command = shlex.split(message.split("`")[1].replace("ITS_ENCODING", "LATIN1"))
    converted = subprocess.run(command, input=data, capture_output=True, check=True)
    write(tmp_path, name, converted.stdout)
    assert load(files(tmp_path))[0].text in ("naïve", "nai", "words and words")


def test_a_text_that_is_cut_off_within_a_character_is_refused(tmp_path):
    write(tmp_path, "cut.txt", "früh".encode()[:3])
    with pytest.raises(ConfigError, match=r"cut\.txt is not UTF-8 at its end .*cut off"):
        load(files(tmp_path))


def test_the_place_of_a_wrong_byte_is_counted_over_all_that_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 7)
    for data in (b"\xef\xbb\xbf" + "ü".encode() * 20 + b"\xff..", b"a" * 43 + b"\xff"):
        write(tmp_path, "a.txt", data)
        with pytest.raises(ConfigError, match=r"byte 0xff at position 43\)"):
            load(files(tmp_path))


@pytest.mark.parametrize(
    "locked", ["locked.txt", "locked.jsonl", "locked.py", "locked.txt.gz", "the folder sub"]
)
def test_the_file_or_folder_that_another_user_cannot_read_is_named(locked):
    name = locked.split()[-1]
    with folder_of_root() as folder:
        if not name.endswith("jsonl"):
            write(folder, "a.txt", "text")
        write(folder, "sub/b.txt" if name == "sub" else name, '{"text": "x"}')
        (folder / name).chmod(0)
        become_nobody()
        with pytest.raises(ConfigError, match=rf"{locked} cannot be read \(Permission denied\)"):
            load(files(folder))


@pytest.mark.parametrize(
    ("pattern", "closed", "mode"),
    [
        ("sub/b.txt", "sub", 0o000),
        ("sub/*.txt", "sub", 0o000),
        ("sub", "sub", 0o000),
        ("sub", "sub", 0o400),  # its files may be listed but not opened
        ("sub/in/*", "sub", 0o000),
        ("sub/in/b.txt", "sub", 0o000),
        ("*/*.txt", "sub", 0o000),
        ("**/*.txt", "sub", 0o000),
        ("**/*.txt", "sub/in", 0o000),
        ("*/in/b.txt", "sub", 0o000),
        ("s*/in/?.txt", "sub/in", 0o000),
        ("sub/**", "sub/in", 0o000),
    ],
)
def test_the_folder_of_a_path_or_pattern_that_another_user_cannot_read_is_named(
    pattern, closed, mode
):
    """A pattern left its files out in silence, and a path ended with a traceback."""
    with folder_of_root() as folder:
        for name in ("a.txt", "sub/b.txt", "sub/in/b.txt", "other/c.txt"):
            write(folder, name, "text")
        (folder / closed).chmod(mode)
        become_nobody()
        with pytest.raises(
            ConfigError, match=rf"the folder \S*{Path(closed).name} cannot be read \(Perm"
        ):
            load(files(folder / pattern))
        assert len(load(files(folder / "other" / "*"))) == 1  # what is not needed may be closed
        assert len(load(files(folder / "*.txt"))) == 1


def test_a_folder_that_is_searched_for_a_name_need_not_be_listed():
    with folder_of_root() as folder:
        write(folder, "sub/b.txt", "text")
        (folder / "sub").chmod(0o111)
        become_nobody()
        assert len(load(files(folder / "sub" / "b.txt"))) == 1
        assert len(load(files(folder / "s*" / "b.txt"))) == 1
