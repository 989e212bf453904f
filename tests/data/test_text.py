"""Documents of a part or of a client, as tasks receive them, against the corpus."""

from __future__ import annotations

import numpy as np
import pytest

from fedgpt.core.options import CorpusOptions, PartitionOptions, TokenizerOptions
from fedgpt.data.partition import partition
from fedgpt.data.prepare import CLIENTS, HELD_OUT, PUBLIC, prepare
from fedgpt.data.text import Text, part_text, shard_text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    for writer in ("ann", "bob", "carol"):
        (root / "text" / writer).mkdir(parents=True)
        for page in range(8):
            words = f"{writer} wrote page {page}: the river rose again and again. " * (page + 1)
            (root / "text" / writer / f"{page}.txt").write_text(words)
    corpus = CorpusOptions("files", client="folder", path=str(root / "text"), public=0.1)
    return prepare(corpus, TokenizerOptions("bytes"), root / "cache")


def documents(prepared, part: int) -> list[tuple[list[int], str]]:
    return [
        (prepared.tokens[prepared.starts[d] : prepared.starts[d + 1]].tolist(), prepared.labels[d])
        for d in np.flatnonzero(prepared.part == part)
    ]


def listed(text: Text) -> list[tuple[list[int], str]]:
    return [(document.tokens.tolist(), document.label) for document in text]


@pytest.mark.parametrize("part", [PUBLIC, HELD_OUT, CLIENTS])
def test_a_part_has_its_documents(prepared, part):
    text = part_text(prepared, part)
    assert len(text) == len(listed(text)) and listed(text) == documents(prepared, part)
    np.testing.assert_array_equal(text.tokens, prepared._part(part))


def test_natural_shards_have_the_documents_of_the_corpus(prepared):
    shards = partition(prepared, PartitionOptions("natural"), 0, 9)
    found = [each for shard in shards for each in listed(shard_text(prepared, shard))]
    assert found == documents(prepared, CLIENTS)
    assert {label for _, label in found} == {"ann", "bob", "carol"}


def test_every_piece_of_a_document_has_its_label(prepared):
    options = PartitionOptions("iid", clients=4, piece=50)
    complete = documents(prepared, CLIENTS)
    ends = 0
    for shard in partition(prepared, options, 0, 9):
        text = shard_text(prepared, shard)
        np.testing.assert_array_equal(text.tokens, shard.read(prepared.tokens))
        for tokens, label in listed(text):
            piece = ",".join(map(str, tokens))
            assert any(label == own and piece in ",".join(map(str, of)) for of, own in complete)
            assert prepared.tokenizer.end not in tokens[:-1], "a piece belongs to one document"
            ends += tokens[-1] == prepared.tokenizer.end
    assert ends == len(complete)


def test_the_text_of_an_empty_part_is_empty(prepared):
    text = part_text(prepared, 7)
    assert len(text) == 0 and listed(text) == [] and text.tokens.size == 0
