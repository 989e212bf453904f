"""What the loading of a run's data tells its user."""

from __future__ import annotations

import pytest
from support.here import tiny_run

from fedgpt.config import compose
from fedgpt.data.shards import load_shards


@pytest.mark.parametrize(
    "asked, told",
    [
        ("bpe", ["tokenizer.vocab_size=50000: the tokenizer has {} entries, as no other pair"]),
        ("enough", []),
        ("bytes", []),
    ],
)
def test_a_tokenizer_that_is_smaller_than_asked_for_is_reported(tmp_path, asked, told):
    sizes = {"bpe": 50000, "enough": 260}
    words = ["tokenizer=bytes"]
    if asked != "bytes":
        words = ["tokenizer=bpe", f"tokenizer.vocab_size={sizes[asked]}"]
    options = compose.load([*tiny_run(tmp_path), *words])
    for _ in range(2):  # made, and opened
        notes: list[str] = []
        prepared, _ = load_shards(options, notes.append)
        entries = prepared.tokenizer.vocab_size - 1
        assert len(notes) == len(told)
        for note, begin in zip(notes, told, strict=True):
            assert note.startswith(begin.format(entries))
