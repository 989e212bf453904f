"""A corpus is read more than once; text that changes in between is one error."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from support.advice import advises
from support.text import files, write

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import TokenizerOptions
from fedgpt.data import prepare as module
from fedgpt.data import reading
from fedgpt.data.corpus import corpus_of
from fedgpt.data.prepare import prepare
from fedgpt.data.survey import survey_of


def folder(tmp_path: Path) -> Path:
    for number in range(20):
        write(tmp_path / "text", f"{number:02}.txt", f"the text of file {number}\n" * 9)
    return tmp_path / "text"


CHANGES = {
    "a text deleted": lambda text: (text / "07.txt").unlink(),
    "the last text deleted": lambda text: (text / "19.txt").unlink(),
    "a text added": lambda text: write(text, "20.txt", "new"),
    "other words": lambda text: write(text, "07.txt", "THE TEXT OF FILE 7\n" * 9),
    "another name": lambda text: (text / "07.txt").rename(text / "07a.txt"),
    "not text any more": lambda text: write(text, "07.txt", b"\xff"),
    "all deleted": lambda text: [path.unlink() for path in text.iterdir()],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_text_that_changes_while_it_is_prepared_is_one_error(
    tmp_path, change, tokenizer, monkeypatch
):
    text = folder(tmp_path)
    split = module.split_documents

    def changing(*arguments):  # after the survey, before the tokens
        CHANGES[change](text)
        return split(*arguments)

    monkeypatch.setattr(module, "split_documents", changing)
    options = TokenizerOptions(name=tokenizer, vocab_size=300)
    with pytest.raises(FedGPTError, match="corpus: the text changed while it was prepared") as hit:
        prepare(files(text, public=0.2, held_out=0.2), options, tmp_path / "cache")
    assert not isinstance(hit.value, ConfigError)  # exit code 1: no option is wrong
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    advises(hit.value, "; start again when it rests")
    monkeypatch.setattr(module, "split_documents", split)
    write(text, "07.txt", "Other words than before.\n")
    for page in range(40):
        write(text, f"more/{page}.txt", f"Page {page} rests now.\n")
    prepare(files(text, public=0.2, held_out=0.2), options, tmp_path / "cache")


def test_a_survey_reads_the_same_texts_again(tmp_path):
    survey = survey_of(corpus_of(files(folder(tmp_path))))
    texts = list(survey.texts())
    assert texts == list(survey.texts()) and len(texts) == 20
    assert [len(text.encode()) for text in texts] == survey.sizes.tolist()


def memory_of(tmp_path: Path, documents: int) -> int:
    """The most bytes that the preparation of short records holds at once."""
    rows = (
        {"who": f"owner {number % 9}", "text": f"It rained {number}."}
        for number in range(documents)
    )
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    tracemalloc.start()
    prepare(files(path, client="who"), TokenizerOptions(name="bytes"), tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_document_takes_little_memory(tmp_path, monkeypatch):
    """2 GB of short records are millions of documents, and about each of them something is kept."""
    monkeypatch.setattr(module, "ENCODE_AT_ONCE", 1000)
    monkeypatch.setattr(reading, "CHUNK", 10_000)
    memory_of(tmp_path, 100)  # what is loaded at first use
    few, many = memory_of(tmp_path, 500), memory_of(tmp_path, 2500)
    assert (many - few) / 2000 < 60
