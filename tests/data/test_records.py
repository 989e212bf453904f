"""Records: every format gives the same texts, and records without a text are counted."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advice import advises
from support.records import MAKERS, POSTS, jsonl
from support.text import files, load, notes, write

from fedgpt.core.errors import ConfigError
from fedgpt.data import reading, records
from fedgpt.data.corpus import corpus_of, read_documents
from fedgpt.data.records import Field, Missing

every_format = pytest.mark.parametrize("suffix", MAKERS)


def test_every_format_of_the_table_in_the_docs_is_tested():
    assert {Path(f"a{suffix}").suffix for suffix in MAKERS} >= {*records.FORMATS, *reading.PACKED}
    page = Path(__file__).parents[2] / "docs" / "your-text.md"
    text = page.read_text(encoding="utf-8")
    assert [s for s in (*records.FORMATS, *reading.PACKED) if f"`{s}`" not in text] == []


# ---- the same documents of every format


@every_format
def test_every_format_gives_the_same_owners_texts_and_labels(tmp_path, suffix):
    path = write(tmp_path, f"posts{suffix}", MAKERS[suffix](POSTS))
    documents = load(files(path, client="who", label_field="kind"))
    found = [{"who": d.client, "text": d.text, "kind": d.label} for d in documents]
    assert found == POSTS
    assert len({d.id for d in documents}) == len(documents)


@every_format
def test_shards_are_one_corpus_whatever_their_number(tmp_path, suffix):
    for number in range(3):
        rows = [POSTS[number]]
        write(tmp_path, f"shards/part-{number}{suffix}", MAKERS[suffix](rows))
    write(tmp_path, f"all{suffix}", MAKERS[suffix](POSTS))
    whole = load(files(tmp_path / f"all{suffix}", client="who"))
    for path in (tmp_path / "shards", tmp_path / "shards" / f"part-*{suffix}"):
        shards = load(files(path, client="who"))
        assert [(d.client, d.text) for d in shards] == [(d.client, d.text) for d in whole]
        assert len({d.id for d in shards}) == len(shards)


def test_shards_of_lines_are_the_documents_of_the_concatenated_file(tmp_path):
    for number in range(3):
        write(tmp_path, f"shards/part-{number}.jsonl", jsonl([POSTS[number]]) + b"\n")
    write(tmp_path, "all.jsonl", b"".join(jsonl([row]) + b"\n" for row in POSTS))
    assert load(files(tmp_path / "shards", client="who")) == load(
        files(tmp_path / "all.jsonl", client="who")
    )


@pytest.mark.parametrize("line_end", ["\r\n", "\r", "\n"])
def test_line_ends_are_the_same_in_records_and_in_text(tmp_path, line_end):
    text = line_end.join(["one", "two", "", "three"])
    write(tmp_path, "a.txt", text)
    [expected] = load(files(tmp_path / "a.txt"))
    assert expected.text == "one\ntwo\n\nthree"
    for suffix, make in MAKERS.items():
        path = write(tmp_path, f"posts{suffix}", make([{"who": "ann", "text": text}]))
        assert [d.text for d in load(files(path, client="who"))] == [expected.text], suffix


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["text", "who", "more"]), st.text(max_size=30) | st.integers()
        ),
        max_size=8,
    ),
    st.integers(1, 40),
    st.sampled_from([None, 1]),
)
def test_a_json_array_is_read_as_the_library_reads_it(tmp_path_factory, rows, chunk, indent):
    """In chunks of any size, which may end within a character, a string or a number."""
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    before, reading.CHUNK = reading.CHUNK, chunk
    try:
        found = [row.record for row in records.FORMATS[".json"].read(path, [])]
    finally:
        reading.CHUNK = before
    assert found == rows


# ---- which records belong to whom


def test_plain_records_need_no_owner(tmp_path):
    """The commonest records: {"text": ...}, with any partition that makes its clients."""
    path = write(tmp_path, "plain.jsonl", jsonl([{"text": row["text"]} for row in POSTS]))
    assert {(d.client, d.label) for d in load(files(path))} == {("plain", "")}
    [note] = notes(files(path))
    assert note.endswith("corpus.client=FIELD gives each record its own")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_a_file_without_records_gets_no_advice_on_their_owner(tmp_path, name):
    path = write(tmp_path, name, {"a.csv": b"who,text\n", "a.json": b"[]"}.get(name, b""))
    with pytest.raises(ConfigError, match="contains no text") as caught:
        load(files(path))
    assert "no records in it" in str(caught.value) and "gives each" not in str(caught.value)


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz"])
@pytest.mark.parametrize("header", ["text{}who{}n", '"text"{}"who"', "Full text{}a-b", "ä{}b"])
def test_a_table_with_another_separator_is_refused(tmp_path, separator, suffix, header):
    """The message advised the whole first row as a field, whose values were whole rows."""
    first = header.replace("{}", separator)
    if separator == ("\t" if suffix == ".tsv" else ","):
        return
    data = f"\n{first}\nIt rained{separator}ann\n".encode()
    path = write(tmp_path, f"a{suffix}", gzip.compress(data) if suffix == ".csv.gz" else data)
    for field in ("text", first.replace('"', "")):
        with pytest.raises(ConfigError, match=rf"a{suffix} has \w+ .*between the names") as caught:
            load(files(path, text_field=field))
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("first", ["sep=;", "sep=,", "SEP=\t", '"sep=;"', "sep=", "\ufeffsep=|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_line_for_excel_is_refused_and_a_table_without_it_is_read(tmp_path, first, suffix):
    """Its own separator would be one of the fields."""
    separator = "\t" if suffix == ".tsv" else ","
    table = f"text{separator}who\nIt rained{separator}ann\n"
    path = write(tmp_path, f"a{suffix}", f"{first}\n{table}")
    with pytest.raises(ConfigError) as refused:
        load(files(path, client="who"))
    advises(
        refused.value,
        "which tells Excel the separator of the table; save it without this line, with commas as"
        " .csv, or with tabs as .tsv",
    )
    write(tmp_path, f"a{suffix}", table)
    assert [(d.client, d.text) for d in load(files(path, client="who"))] == [("ann", "It rained")]


def test_a_field_whose_name_begins_like_a_line_for_excel_is_read(tmp_path):
    path = write(tmp_path, "a.csv", "sep=;,text\n1,It rained\n")
    assert [d.text for d in load(files(path))] == ["It rained"]


@pytest.mark.parametrize(
    "header", ["what was said, and by whom; when", "text;", "a; b", "text", "(x|y)", "100% | 5%"]
)
def test_a_table_of_one_field_may_have_any_sign_in_its_name(tmp_path, header):
    quoted = header.replace('"', "")
    path = write(tmp_path, "a.csv", f'"{quoted}"\nIt rained\n')
    assert [d.text for d in load(files(path, text_field=quoted))] == ["It rained"]


def test_the_asked_field_between_other_signs_shows_the_separator(tmp_path):
    path = write(tmp_path, "a.csv", "text; said (by)\nIt rained; ann\n")
    with pytest.raises(ConfigError, match="has semicolons between the names"):
        load(files(path))


def test_a_file_or_folder_owns_its_records(tmp_path):
    for name in ("ann/1.jsonl", "ann/2.jsonl", "bob.csv"):
        write(tmp_path, name, MAKERS[Path(name).suffix](POSTS))
    assert {d.client for d in load(files(tmp_path))} == {"ann/1", "ann/2", "bob"}
    by_folder = load(files(tmp_path, client="folder"))
    assert {d.client for d in by_folder} == {"ann", tmp_path.name}
    assert {d.label for d in by_folder} == {"ann", ""}
    assert notes(files(tmp_path)) == []


def test_a_field_named_file_is_the_owner_and_that_is_reported(tmp_path):
    rows = [{"file": row["who"], "text": row["text"]} for row in POSTS]
    path = write(tmp_path, "posts.jsonl", jsonl(rows))
    assert {d.client for d in load(files(path))} == {"ann", "bob"}
    assert notes(files(path)) == [
        f"corpus.path={path}: corpus.client=file is a field of the records here"
    ]


def test_texts_beside_records_are_reported(tmp_path):
    write(tmp_path, "README.md", "about the records")
    write(tmp_path, "posts.jsonl", jsonl(POSTS))
    assert {d.client for d in load(files(tmp_path, client="who"))} == {"ann", "bob"}
    [note] = notes(files(tmp_path, client="who"))
    assert "left out 1 file: README.md (text, while records are read)" in note
    assert [d.client for d in load(files(tmp_path))] == ["README"]
    [note] = notes(files(tmp_path))
    assert "posts.jsonl (records, while text is read; corpus.path='FOLDER/*.jsonl' reads" in note
    assert len(load(files(tmp_path / "*.jsonl"))) == 3  # the remedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages[1].content", "second"),
        ("messages[-1].content", "second"),
        ("data.text", "inner"),
        ("data.a.b", "literal"),  # a field with exactly this name comes first
        ("data.list[0]", "item"),
    ],
)
def test_a_path_leads_into_a_record(tmp_path, field, value):
    row = {
        "messages": [{"content": "first"}, {"content": "second"}],
        "data": {"text": "inner", "a": {"b": "nested"}, "list": ["item"]},
        "data.a.b": "literal",
    }
    for suffix in (".jsonl", ".json", ".parquet"):
        path = write(tmp_path, f"a{suffix}", MAKERS[suffix]([row]))
        assert [d.text for d in load(files(path, text_field=field))] == [value]
        by_path = load(files(path, text_field="data.text", client=field, label_field=field))
        assert [(d.client, d.label) for d in by_path] == [(value, value)]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("data.txt", "no 'txt'; its fields: text; did you mean 'text'?"),
        ("messages[2]", "no 2 in a list of 1"),
        ("messages.content", "no 'content' in a list of 1"),
        ("data.text.more", "no 'more' in text"),
        ("a..b", "no such field; its fields: data, messages"),
        ("messages[x]", "no such field; its fields: data, messages"),
    ],
)
def test_a_wrong_path_says_where_it_ends(field, message):
    with pytest.raises(Missing) as caught:
        Field(field).of({"data": {"text": "x"}, "messages": [{}]})
    assert str(caught.value).startswith(message)


# ---- records that cannot be used

BAD = [
    ('{"who": "ann", "text": null}', "corpus.text_field=text: is null, not text"),
    ('{"who": "ann"}', "corpus.text_field=text: no such field"),
    ('{"who": "ann", "text": ["x"]}', "corpus.text_field=text: is a list, not text"),
    ('{"who": "", "text": "x"}', "corpus.client=who: is empty"),
    ('{"who": null, "text": "x"}', "corpus.client=who: is null"),
    ('{"text": "x"}', "corpus.client=who: no such field"),
    ('{"who": "ann", "text": "x"', "not JSON"),
    ("[" * 100_000 + "]" * 100_000, "has too many lists or objects within each other"),
    ('"text"', "must be an object with fields, not text"),
    ('{"who": "ann", "text": "a", "text": "b"}', "has two fields 'text'"),
    ('{"text": "x", "who": ' + "9" * 5000 + ', "who": "bob"}', "has two fields 'who'"),
    ('{"who": true, "who": "ann", "text": 3}', "has two fields 'who'"),
    ('{"who": NaN, "text": "x"}', "corpus.client=who: is null; every record needs an owner"),
    ('{"who": ["ann"], "text": "x"}', "corpus.client=who: is a list"),
]


@pytest.mark.parametrize(("line", "problem"), BAD)
def test_a_bad_record_is_refused_with_its_line_or_left_out_and_reported(tmp_path, line, problem):
    good = jsonl(POSTS).decode()
    path = write(tmp_path, "posts.jsonl", f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(ConfigError) as caught:
        load(files(path, client="who"))
    [message] = caught.value.problems
    assert f"corpus.path={path}: 1 of 7 records cannot be used; mend them" in message
    assert "line 5: " in message and problem in message
    assert "corpus.bad_records=skip" in message  # the remedy, which is tried:
    skipping = files(path, client="who", bad_records="skip")
    assert [d.text for d in load(skipping)] == [row["text"] for row in POSTS] * 2
    [note] = notes(skipping)
    assert "left out 1 of 7 records that cannot be used (corpus.bad_records=skip): line 5" in note


@pytest.mark.parametrize(("line", "problem"), [bad for bad in BAD if "two fields" in bad[1]])
def test_a_name_that_stands_twice_in_an_object_of_an_array_is_a_bad_record(
    tmp_path, line, problem, monkeypatch
):
    """The last value was read, without a word of the first."""
    monkeypatch.setattr(reading, "CHUNK", 50)
    good = ", ".join(json.dumps(row) for row in POSTS)
    path = write(tmp_path, "posts.json", f"[{good}, {line}, {good}]")
    with pytest.raises(ConfigError, match=rf"1 of 7 records.*record 4: {problem}"):
        load(files(path, client="who"))
    assert len(load(files(path, client="who", bad_records="skip"))) == 6


@pytest.mark.parametrize("value", [["a"], {"a": 1}, []])
def test_a_label_that_is_a_list_or_an_object_is_refused(tmp_path, value):
    """It became the label "['a']"."""
    path = write(tmp_path, "a.jsonl", jsonl([{"text": "x", "kind": value}]))
    with pytest.raises(ConfigError, match=r"label_field=kind: is (a list|an object), not a label"):
        load(files(path, label_field="kind"))


def test_an_owner_or_label_has_the_same_name_in_every_format(tmp_path):
    values = {"true": True, "1": 1, "1.5": 1.5, "True": "True", "": None, "false": False}
    rows = [{"who": value or "0", "text": "x", "kind": value} for value in values.values()]
    for suffix in (".jsonl", ".json"):
        path = write(tmp_path, f"a{suffix}", MAKERS[suffix](rows))
        found = load(files(path, client="who", label_field="kind"))
        assert [d.label for d in found] == list(values)
        assert [d.client for d in found] == ["true", "1", "1.5", "True", "0", "0"]
    path = write(tmp_path, "nan.jsonl", '{"text": "x", "kind": NaN}')
    assert [d.label for d in load(files(path, label_field="kind"))] == [""]
    pyarrow = pytest.importorskip("pyarrow")
    columns = {"text": ["x"] * 3, "kind": [True, False, None], "who": pyarrow.array([1, 2, 3])}
    __import__("pyarrow.parquet").parquet.write_table(
        pyarrow.table(columns), tmp_path / "a.parquet"
    )
    found = load(files(tmp_path / "a.parquet", client="who", label_field="kind"))
    assert [(d.client, d.label) for d in found] == [("1", "true"), ("2", "false"), ("3", "")]


def test_blank_texts_are_left_out_counted_and_reported(tmp_path):
    rows = [*POSTS, {"who": "ann", "text": " \n"}, {"who": "bob", "text": ""}]
    path = write(tmp_path, "posts.jsonl", jsonl(rows))
    assert len(load(files(path, client="who"))) == 3
    [note] = notes(files(path, client="who"))
    assert note.endswith("left out 2 of 5 records whose text is blank: line 4, line 5")


def test_all_bad_records_are_reported_at_once_and_no_more_than_three_in_full(tmp_path):
    rows = [*POSTS, *[{"who": "ann", "text": None}] * 2, *POSTS, *[{"who": "ann"}] * 2]
    path = write(tmp_path, "posts.jsonl", jsonl(rows))
    with pytest.raises(ConfigError) as caught:
        load(files(path, client="who"))
    [message] = caught.value.problems
    assert "4 of 10 records" in message
    assert all(place in message for place in ("line 4", "line 5", "line 9", "..."))
    assert "line 10" not in message


def test_not_more_records_are_left_out_than_are_used(tmp_path):
    path = write(tmp_path, "posts.jsonl", jsonl([*POSTS, *[{"who": "ann"}] * 3]))
    for bad_records in ("refuse", "skip"):
        with pytest.raises(ConfigError) as caught:
            load(files(path, client="who", bad_records=bad_records))
        [message] = caught.value.problems
        assert "3 of 6 records cannot be used" in message
        assert "or leave them out" not in message  # which would not help


def test_wrong_options_are_reported_after_the_first_hundred_records(tmp_path):
    path = write(tmp_path, "posts.jsonl", jsonl([POSTS[0]] * 1000) + b"\nnot read")
    with pytest.raises(ConfigError, match=r"the first 100 records cannot be used.*did you mean"):
        load(files(path, text_field="texts"))


LONG = st.sampled_from(["n", "secret " * 200, "s" * 5000, "\n" * 300, "text" * 50])
HUGE = st.recursive(
    LONG | st.none() | st.just(10**3000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LONG, inner, max_size=3),
    max_leaves=4,
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.dictionaries(LONG | st.sampled_from(["text", "who", "kind"]), HUGE, max_size=6)
        | st.just({f"field {number}": number for number in range(200)}),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(list(MAKERS)),
    st.sampled_from(["who", "who.first.name"]),
)
def test_a_message_has_an_upper_end_whatever_the_records_hold(
    tmp_path_factory, rows, suffix, client
):
    """A table without a row of names had its first row in the message, with all its text."""
    folder = tmp_path_factory.mktemp("huge")
    if suffix == ".parquet":
        suffix = ".jsonl"
    path = write(folder, f"a{suffix}", MAKERS[suffix](rows))
    options = files(path, client=client, label_field="kind")
    for each in (options, replace(options, bad_records="skip")):
        try:
            told = notes(each)
        except ConfigError as error:
            told = error.problems
        assert all(len(line.replace(str(path), "")) < 700 and line.isprintable() for line in told)


def test_half_a_surrogate_pair_is_reported(tmp_path):
    path = write(tmp_path, "posts.jsonl", '{"who": "x", "text": "cut \\ud83d"}\n')
    assert [d.text for d in load(files(path, client="who"))] == ["cut �"]
    [note] = notes(files(path, client="who"))
    assert "in 1 record half a surrogate pair" in note and note.endswith("became U+FFFD")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_number_of_thousands_of_digits_does_no_harm(tmp_path, suffix):
    digits = "9" * 5000
    line = f'{{"who": {digits}, "text": "x"}}'
    path = write(tmp_path, f"a{suffix}", f"[{line}]" if suffix == ".json" else line)
    assert [(d.client, d.text) for d in load(files(path, client="who"))] == [(digits, "x")]


# ---- damage, limits and tables


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "x"}', r"line 1 \(the end is missing\)"),
        ('[{"text": "x"},\n{"text": "y', r"line 2 \(Unterminated string"),
        ('[{"text": "x"} {"text": "y"}]', r"line 1 \(expected ',' or '\]'\)"),
        ('[{"text": "x"}] more', r"line 1 \(text after the end"),
        ('[{"text": "x"},]', r"line 1 \(Expecting value"),
        ("words", r"line 1 \(Expecting value"),
        ('[{"text": "x", "n": ' + "[" * 100_000, "record 1 has too many lists"),
        ("", "contains no text"),
        ("[]", "contains no text"),
    ],
)
def test_damaged_json_is_refused_with_its_line(tmp_path, text, message):
    path = write(tmp_path, "a.json", text)
    for bad_records in ("refuse", "skip"):  # what follows the damage cannot be found
        with pytest.raises(ConfigError, match=message):
            load(files(path, bad_records=bad_records))


def test_one_object_is_one_record(tmp_path):
    path = write(tmp_path, "a.json", '{\n "data": {"text": "x"}\n}\n')
    assert [d.text for d in load(files(path, text_field="data.text"))] == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_record_has_an_upper_limit(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1000)
    rows = [{"text": "x" * 900}, {"text": "ü" * 900}, {"text": "z"}, {"text": "w"}]
    path = write(tmp_path, f"a{suffix}", MAKERS[suffix](rows))
    monkeypatch.setattr(reading, "CHUNK", 100)
    with pytest.raises(ConfigError, match=r"(record|line) [23].* is larger than"):
        load(files(path))
    if suffix != ".json":
        texts = [d.text for d in load(files(path, bad_records="skip"))]
        assert texts == ["x" * 900, "z", "w"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,text\nann\n", "line 2: has 1 value; the first row names 2 fields"),
        ("who,text\nann,x,y\n", "line 2: has 3 values; the first row names 2 fields"),
        ('who,text\nann,"x\n', r"line 2: is not a row of a table \(unexpected end of data\)"),
        ('who,text\nann,"x"y\n', "line 2: is not a row of a table"),
        ("who;text\nann;x\n", "a.csv has semicolons between the names in its first row"),
        ("text,text\nx,y\n", "has two fields 'text' in line 1"),
        (",\nx,y\n", "has no names of fields in line 1"),
        ("who,text\n", "contains no text"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_line(tmp_path, text, message):
    path = write(tmp_path, "a.csv", text)
    with pytest.raises(ConfigError, match=message):
        load(files(path, client="who"))


ROWS = [f"{number},ann,words of row {number}" for number in range(60)]


def with_quotes(first: str, last: str, separator: str) -> str:
    """A table in which `first` begins the text of row 39, and `last` ends the row 55."""
    rows = list(ROWS)
    rows[39] = f"39,ann,{first}words"
    rows[55] += last
    return "\n".join(["id,who,text", *rows, ""]).replace(",", separator)


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(
    ("first", "last", "message"),
    [
        ('"', "", "line 41 on: a quoted value there has no end before line 61 .unexpected end"),
        ('"', '"x', "line 41 on: a quoted value there has no end before line 57"),
        (
            '"',
            '"',
            "a quoted value from line 41 to line 57, and most of these lines look like rows",
        ),
        ('"', '"SEPARATORx', "a quoted value from line 41 to line 57"),  # not of three values
    ],
)
def test_rows_inside_a_quoted_value_are_refused(tmp_path, separator, first, last, message):
    """They were one text, or one bad record that was left out with all rows after it."""
    text = with_quotes(first, last.replace("SEPARATOR", separator), separator)
    path = write(tmp_path, "a.csv" if separator == "," else "a.tsv", text)
    for bad_records in ("refuse", "skip"):
        with pytest.raises(ConfigError, match=message):
            load(files(path, client="who", bad_records=bad_records))


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("merged", [4, 5, 30])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_of_two_values_that_a_quote_joins_are_refused(tmp_path, text_first, merged, separator):
    rows = [["ann", f"words of row {number}"] for number in range(40)]
    rows[5][1], rows[4 + merged][1] = '"' + rows[5][1], rows[4 + merged][1] + '"'
    if text_first:
        rows = [list(reversed(row)) for row in rows]
    lines = [separator.join(row) for row in [["who", "text"][:: -1 if text_first else 1], *rows]]
    path = write(tmp_path, "a.csv" if separator == "," else "a.tsv", "\n".join(lines))
    with pytest.raises(ConfigError, match=f"a quoted value from line 7 to line {6 + merged}"):
        load(files(path, client="who"))


def test_two_rows_of_many_values_that_a_quote_joins_are_refused(tmp_path):
    rows = ["who,kind,n,text", "ann,a,1,words", 'bob,b,2,"words', 'eve,c,3,words"', "ann,a,4,words"]
    path = write(tmp_path, "a.csv", "\n".join(rows))
    with pytest.raises(ConfigError, match="a quoted value from line 3 to line 4"):
        load(files(path, client="who"))


def test_a_quote_in_the_first_row_joins_no_rows_to_a_name(tmp_path):
    path = write(tmp_path, "a.csv", 'who,"text\nann,one\nann,two\nann,three\nann,four"\nann,five\n')
    with pytest.raises(ConfigError, match="a quoted value from line 1 to line 5"):
        load(files(path, client="who"))


def test_a_row_of_one_line_with_wrong_quotes_is_a_bad_record(tmp_path):
    rows = [*ROWS[:5], '5,ann,"x"y', *ROWS[6:], '60,ann,"not closed']
    path = write(tmp_path, "a.csv", "\n".join(["id,who,text", *rows]))
    documents = load(files(path, client="who", bad_records="skip"))
    assert [d.text for d in documents] == [f"words of row {n}" for n in range(60) if n != 5]


LOOK_ALIKES = {
    "poem": "Come, reader, and sit,\nthe lamp, now lit,\nis low, but warm,\nagainst, you see,\n",
    "one comma in each line": "The fire is low\nthe lamp, it flickers\nsay, who knocks\nno, none",
    "address": "Ann Doe\n1 Mill Lane, Ely\nCambridge, Isle of Ely\nEngland, United Kingdom",
    "list": "apples,\npears,\nplums,\nnuts,",
    "code": "def f(a, b):\n    x, y = a, b\n    return g(x, y)\n",
    "code with tabs": "if x:\n\ty()\n\tz()\n\tw()\nelse:\n\tpass",
    "packed code": "function f(a,b) {\n  x(a,b);\n  y(b,a);\n  z(a,a);\n}",
    "numbers": "we counted\n1,500 herons\n2,300 gulls",
    "a table in prose": "We saw\na,b\n1,2\n3,4\n5,6\nand went home.\nIt rained.\nIt snowed.",
    "blank lines": "one\n\n\n\ntwo, three\n\n",
    "quotes": '"a,b"\n"c,d"\nand "e,f"',
}


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("columns", [["text"], ["text", "n"], ["n", "text"], ["n", "text", "m"]])
@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_texts_of_several_lines_are_read(tmp_path, kind, columns, separator):
    text = LOOK_ALIKES[kind]
    rows = [{name: text if name == "text" else str(n) for name in columns} for n in range(3)]
    suffix = ".csv" if separator == "," else ".tsv"
    path = write(tmp_path, f"a{suffix}", MAKERS[suffix](rows))
    assert [d.text for d in load(files(path))] == [text] * 3


def test_quoted_cells_hold_line_ends_and_blank_lines_do_not_count(tmp_path):
    path = write(tmp_path, "a.csv", '\n\ntext,who\n"one\n\ntwo",ann\n\n"three ""3""",bob\n')
    assert [(d.client, d.text, d.id) for d in load(files(path, client="who"))] == [
        ("ann", "one\n\ntwo", "line 4"),
        ("bob", 'three "3"', "line 8"),
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.zst"])
def test_without_the_extra_a_file_is_refused_with_what_to_install(tmp_path, suffix, monkeypatch):
    path = write(tmp_path, f"a{suffix}", MAKERS[suffix](POSTS))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=rf"a{suffix} is .*pip install 'fedgpt\[records\]'"):
        load(files(path, client="who"))


def test_a_long_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    """The parts of a file are freed while it is read: only a few may live at once."""
    alive, most = 0, 0

    class Counted(str):
        def __new__(cls, text: str):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, text)

        def __del__(self):
            nonlocal alive
            alive -= 1

    chunks = reading.text_chunks

    def counted(path):
        return map(Counted, chunks(path))

    monkeypatch.setattr("fedgpt.data.folder_text.text_chunks", counted)
    monkeypatch.setattr(records, "text_chunks", counted)
    monkeypatch.setattr(reading, "CHUNK", 1000)
    write(tmp_path, "one line.txt", "words " * 20_000)
    rows = [{"text": "words " * 20}] * 1000
    for suffix in (".jsonl", ".json", ".csv"):
        write(tmp_path, f"records/a{suffix}", MAKERS[suffix](rows))
    for path in (tmp_path, *sorted((tmp_path / "records").iterdir())):
        most = 0
        for _ in read_documents(corpus_of(files(path))):
            pass
        assert 0 < most < 10, path
