"""The output of `fedgpt data`."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedgpt.core.options import CorpusOptions, PartitionOptions, TokenizerOptions
from fedgpt.data.partition import partition
from fedgpt.data.prepare import prepare
from fedgpt.report.shards import data_report, histogram


@pytest.fixture
def prepared(tmp_path):
    """Twelve writers: the n-th has written n pages."""
    folder = tmp_path / "text"
    for person in range(12):
        (folder / f"writer {person:02d} [x]").mkdir(parents=True)
        for page in range(person + 1):
            text = f"第{page}页:writer {person} saw the river rise. " * (page + 3)
            (folder / f"writer {person:02d} [x]" / f"{page}.txt").write_text(text, encoding="utf-8")
    corpus = CorpusOptions(
        name="files", client="folder", path=str(folder), public=0.05, held_out=0.05
    )
    return prepare(corpus, TokenizerOptions(name="bytes"), tmp_path / "cache")


def report(prepared, shards, **console) -> str:
    stream = io.StringIO()
    data_report(prepared, shards, Console(file=stream, width=80, **console))
    return stream.getvalue()


def test_the_report_shows_the_data_of_a_run(prepared):
    shards = partition(prepared, PartitionOptions(), 0, 65)
    text = report(prepared, shards)
    split = prepared.manifest["split"]
    facts = [
        "files, owner of a text = folder",
        f"{prepared.manifest['documents']} documents, {prepared.manifest['bytes']:,} bytes",
        "bytes, 257 ids",
        str(prepared.folder),
        f"{split['held_out']['tokens']:,}",
        f"{split['clients']['bytes']:,}",
        f"{len(shards)} clients, tokens per client: min {min(s.size for s in shards):,}",
        "largest   writer 11 [x]",
    ]
    for fact in facts:
        assert fact in text, fact
    assert "left out" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_without_a_terminal_the_report_is_plain_text(prepared):
    text = report(prepared, partition(prepared, PartitionOptions(), 0, 65))
    assert text.isascii() and "#" in text
    assert "█" in report(
        prepared, partition(prepared, PartitionOptions(), 0, 65), force_terminal=True
    )


def test_the_report_says_how_many_clients_are_left_out(prepared):
    shards = partition(prepared, PartitionOptions(clients=3), 0, 65)
    everybody = partition(prepared, PartitionOptions(), 0, 1)
    missing = sum(shard.size for shard in everybody) - sum(shard.size for shard in shards)
    assert f"left out: {len(everybody) - 3} clients with {missing:,} tokens" in report(
        prepared, shards
    )


def test_few_clients_are_all_named(prepared):
    shards = partition(prepared, PartitionOptions(name="iid", clients=3, piece=64), 0, 65)
    text = report(prepared, shards)
    assert "smallest" not in text and all(f"client-00{number}" in text for number in range(3))


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=50))
def test_the_histogram_counts_every_client_once(sizes):
    lines = histogram(np.array(sizes))
    total = 0
    for line in lines[1:]:
        first, last, count = line.split("#")[0].replace(" - ", " ").replace(",", "").split()
        assert int(count) == sum(int(first) <= size <= int(last) for size in sizes)
        total += int(count)
    assert total == len(sizes)
    assert len(lines) <= 26
