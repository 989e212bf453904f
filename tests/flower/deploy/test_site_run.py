"""Runs whose clients have their own text, over a real SuperLink."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from support.sites import NAMES, Texts, start_site
from support.superlink import live_superlink

from fedgpt.config.compose import load
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path) -> Texts:
    return Texts.write(tmp_path)


def test_own_text_gives_the_weights_of_the_pool_on_the_same_shards(texts, tmp_path):
    pool = texts.in_one_place(f"run_dir={tmp_path / 'pool'}")
    options = load(texts.at_sites(f"run_dir={tmp_path / 'run'}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in NAMES:
            start_site(nodes, link, texts, name)
        summary = serve(options, link.grid())
    assert summary["weights_sha256"] == pool["weights_sha256"]
    assert summary["final"] == pool["final"] and summary["rejected"] == {}
