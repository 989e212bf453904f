"""Base weights at a site: what it keeps of what a server sends, and what it refuses."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedgpt.client import bases as module
from fedgpt.client.bases import BaseRefused, SiteBases
from fedgpt.client.tidy import KEEP_SECONDS
from fedgpt.core.flat import base_digest, base_info, base_values, frozen_weights
from fedgpt.core.messages import BaseInfo, BasePiece
from fedgpt.core.options import ModelOptions
from fedgpt.model.build import build_model, freeze
from fedgpt.model.gpt import GPT

VOCAB = 40
MODEL = ModelOptions(
    n_layer=2, n_head=2, n_embd=8, block_size=8, trainable=["transformer.h.1.*", "lm_head.*"]
)


def base_of(options: ModelOptions = MODEL, seed: int = 3) -> dict[str, torch.Tensor]:
    model = GPT(options, VOCAB)
    model.init_weights(seed)
    freeze(model, options.trainable)
    return frozen_weights(model)


def pieces(
    base: Mapping[str, torch.Tensor], size: int = 1000, info: BaseInfo | None = None
) -> list[BasePiece]:
    info = info or base_info(base)
    values = base_values(base, 0, 1 << 40)
    starts = range(0, len(values), size)
    return [BasePiece(info, "t", start, values[start : start + size]) for start in starts]


@pytest.fixture
def kept(tmp_path) -> SiteBases:
    return SiteBases(tmp_path / "bases", MODEL)


@pytest.mark.parametrize("tie", [True, False])
def test_a_base_that_came_in_pieces_is_the_one_of_the_server(tmp_path, tie):
    """Also after a new start of the client, which goes on where it was."""
    options = replace(MODEL, tie=tie)
    base = base_of(options)
    info = base_info(base)
    for piece in pieces(base):
        kept = SiteBases(tmp_path / "bases", options)
        assert kept.begin(info, VOCAB) == piece.offset and not kept.of(info.digest, VOCAB)
        assert kept.add(piece, VOCAB) == piece.offset + piece.values.nbytes
    assert kept.begin(info, VOCAB) == info.bytes
    found = kept.of(info.digest, VOCAB)
    assert base_digest(found) == info.digest == base_digest(base)
    model = build_model(options, VOCAB, found)
    assert all(torch.equal(one, base[name]) for name, one in frozen_weights(model).items())
    assert [path.name for path in sorted((tmp_path / "bases").iterdir())] == [info.digest, "lock"]


def test_a_piece_that_is_not_the_next_one_changes_nothing(kept):
    first, second, third, *_ = pieces(base_of())
    assert kept.add(second, VOCAB) == 0
    assert kept.add(first, VOCAB) == 1000 == kept.add(first, VOCAB) == kept.add(third, VOCAB)
    assert kept.add(second, VOCAB) == 2000


OTHER_NAMES = replace(MODEL, trainable=["transformer.h.0.*", "lm_head.*"])  # of the same shapes
OTHER_SHAPES = replace(MODEL, n_embd=16)


@pytest.mark.parametrize(
    "options, why",
    [(OTHER_NAMES, "names or shapes differ"), (OTHER_SHAPES, "names or shapes differ")],
    ids=["names", "shapes"],
)
def test_a_base_of_another_model_is_refused_before_any_of_it_is_sent(kept, options, why):
    info = base_info(base_of(options))
    with pytest.raises(BaseRefused, match=why):
        kept.begin(info, VOCAB)
    with pytest.raises(BaseRefused, match=why):
        kept.add(pieces(base_of(options))[0], VOCAB)
    assert not kept.of(info.digest, VOCAB)


def test_a_base_for_a_run_that_freezes_nothing_is_refused(tmp_path):
    kept = SiteBases(tmp_path, replace(MODEL, trainable=[]))
    with pytest.raises(BaseRefused, match="freeze none"):
        kept.begin(base_info(base_of()), VOCAB)


@pytest.mark.parametrize("digest", ["", "../../evil", "0" * 63, "0" * 63 + "/", "A" * 64])
def test_what_is_no_digest_becomes_no_path(kept, tmp_path, digest):
    info = replace(base_info(base_of()), digest=digest)
    with pytest.raises(BaseRefused, match="is no digest"):
        kept.add(replace(pieces(base_of())[0], info=info), VOCAB)
    assert not kept.of(digest, VOCAB)
    kept.remove(digest)
    assert {path.name for path in tmp_path.rglob("*")} <= {"bases", "lock"}


def test_more_than_the_size_is_refused(kept):
    base = base_of()
    (whole,) = pieces(base, 1 << 40)
    longer = replace(whole, values=np.append(whole.values, np.zeros(4, np.uint8)))
    with pytest.raises(BaseRefused, match="sends more than the"):
        kept.add(longer, VOCAB)
    assert not any(kept.folder.glob("[0-9a-f]*"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(kept, value):
    base = base_of()
    base["transformer.h.0.attn.c_attn.weight"][3, 2] = value
    *first, last = pieces(base)
    for piece in first:
        kept.add(piece, VOCAB)
    with pytest.raises(BaseRefused, match="not finite"):
        kept.add(last, VOCAB)
    assert not any(kept.folder.glob("[0-9a-f]*"))


def test_other_values_than_those_of_the_digest_are_refused(kept):
    base = base_of()
    *first, last = pieces(base_of(seed=4), info=base_info(base))
    for piece in first:
        kept.add(piece, VOCAB)
    with pytest.raises(BaseRefused, match="do not have the digest"):
        kept.add(last, VOCAB)
    assert kept.begin(base_info(base), VOCAB) == 0, "it is sent again from the first byte"


def test_a_base_larger_than_memory_or_disk_is_refused(kept, monkeypatch):
    info = base_info(base_of())
    with monkeypatch.context() as patch, pytest.raises(BaseRefused, match="bytes of memory"):
        patch.setattr(module, "memory", lambda: info.bytes - 1)
        kept.begin(info, VOCAB)
    monkeypatch.setattr(module, "LEAST_FREE", 1 << 60)
    with pytest.raises(BaseRefused, match="disk has no room"):
        kept.begin(info, VOCAB)


def test_a_file_of_another_size_is_sent_again(kept):
    base = base_of()
    info = base_info(base)
    for piece in pieces(base):
        kept.add(piece, VOCAB)
    os.truncate(kept.folder / info.digest, 10)
    assert not kept.of(info.digest, VOCAB) and kept.begin(info, VOCAB) == 0
    for piece in pieces(base):
        kept.add(piece, VOCAB)
    assert base_digest(kept.of(info.digest, VOCAB)) == info.digest


def aged(path: Path) -> Path:
    before = time.time() - KEEP_SECONDS - 60
    os.utime(path, (before, before))
    return path


def test_bases_that_no_run_has_used_for_a_month_go_and_other_files_stay(kept):
    bases = [base_of(seed=seed) for seed in (3, 4, 5)]
    digests = [base_info(base).digest for base in bases]
    for base in bases:
        for piece in pieces(base):
            kept.add(piece, VOCAB)
    for name in (f"{'0' * 64}.part", "notes.txt", "0" * 63):
        (kept.folder / name).write_text("of the owner")
        aged(kept.folder / name)
    for digest in digests:
        aged(kept.folder / digest)
    assert kept.of(digests[1], VOCAB)  # it is in use again
    kept.tidy(used=digests[0])
    left = {path.name for path in kept.folder.iterdir()}
    assert left == {digests[0], digests[1], "lock", "notes.txt", "0" * 63}
