"""The text of a site in a private run: it stays as it was at the run's first job."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.sites import write_text

from fedgpt.client.site import Site
from fedgpt.client.texts import SiteText
from fedgpt.core.files import SUMS, sums_of
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import CorpusOptions, RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import make_tokenizer


def test_an_entry_of_the_cache_with_a_tokenizer_that_cannot_be_read_is_made_again(tmp_path):
    """Such as by another version of the library: its digests are right."""
    write_text(tmp_path / "text", "ann", pages=8)
    corpus = CorpusOptions(name="files", path=str(tmp_path / "text"), client="file")
    site = Site("ann", corpus, str(tmp_path / "state"), str(tmp_path / "cache"))
    options = RunOptions()
    options.privacy = replace(options.privacy, unit="example")
    text = SiteText(site, options)
    text.introduce(make_tokenizer(TokenizerOptions(name="bytes"), []).definition)
    plan = Plan("run", 2, 0, 32, 640, digests={"tokenizer": text.tokenizer.digest})
    job = Job("ann", 0, 0, np.zeros(3, np.float32), plan)
    first = text.of(job, 0)
    (damaged,) = tmp_path.glob("cache/**/tokens.npy")
    (damaged.parent / "tokenizer.json").write_text("{}")
    (damaged.parent / SUMS).write_text(sums_of(damaged.parent))
    again = SiteText(site, options).of(job, 0)
    assert np.array_equal(first.tokens, again.tokens)
