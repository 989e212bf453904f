"""The text of a site: what it keeps in its folders, and what it removes again."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.sites import Texts, write_text
from support.tokenizer_families import FAMILIES

from fedgpt.client.site import Site
from fedgpt.client.texts import OF_RUN, SiteText
from fedgpt.client.tidy import KEEP_SECONDS
from fedgpt.config.compose import load
from fedgpt.core.errors import FedGPTError, PartMissing
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import RunOptions, TokenizerOptions
from fedgpt.data.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from fedgpt.flower.site_config import site_of

TOKENIZER = make_tokenizer(TokenizerOptions(name="bytes"), ())
OTHER = make_tokenizer(TokenizerOptions(vocab_size=260), ["the herons by the river"] * 9)


@pytest.fixture
def texts(tmp_path) -> Texts:
    return Texts.write(tmp_path)


def site(texts: Texts, name: str = "ann", **more: str) -> Site:
    found = site_of({**texts.config(name), "cache-dir": str(texts.folder / "cache"), **more})
    assert found is not None
    return found


def options(texts: Texts, *words: str) -> RunOptions:
    return load(texts.at_sites(*words))


def job(tokenizer: Tokenizer = TOKENIZER, run: str = "run") -> Job:
    plan = Plan(run, 1, 0, 1, 1, digests={"tokenizer": tokenizer.digest})
    return Job("ann", 0, 0, np.zeros(1, np.float32), plan)


def entries(one: Site) -> set[str]:
    return {path.name for path in (Path(one.cache_dir) / one.cache_name).glob("own-*")}


def test_what_was_prepared_of_an_earlier_text_is_removed(texts):
    one, others = site(texts), site(texts, "bob")
    for each in (one, others):
        SiteText(each, options(texts)).introduce(TOKENIZER.definition)
    of_others, before = entries(others), entries(one)
    mine = Path(one.cache_dir) / one.cache_name / "notes"
    mine.mkdir()
    text = SiteText(one, options(texts))
    for page in (50, 60, 70):
        write_text(texts.of("ann"), "ann", 1, first=page)
        text.introduce(TOKENIZER.definition)
        now = {name for name in entries(one) if not name.endswith(".lock")}
        assert len(now) == 1 and not now & before and len(entries(one)) == 2
        before = now
    SiteText(one, options(texts)).introduce(OTHER.definition)
    assert len([name for name in entries(one) if not name.endswith(".lock")]) == 2
    assert entries(others) == of_others and mine.is_dir()


def test_a_site_may_have_the_name_of_a_file_in_its_state(texts):
    one = replace(site(texts), name=OF_RUN)
    private = options(texts, "privacy=example", "privacy.noise_multiplier=1")
    for _ in range(2):  # the second start finds the folder of the first one's job
        text = SiteText(one, private)
        text.introduce(TOKENIZER.definition)
        text.of(replace(job(), client=OF_RUN), 0)
    assert Path(one.runs, "run", OF_RUN).is_dir()


@pytest.mark.parametrize("unit", ["example", "local"])
def test_the_text_of_a_private_run_stays_as_long_as_its_state(texts, unit):
    one = site(texts)
    private = options(texts, f"privacy={unit}", "privacy.noise_multiplier=1")
    text = SiteText(one, private)
    text.introduce(TOKENIZER.definition)
    first = text.of(job(), 0).tokens.copy()
    write_text(texts.of("ann"), "ann", 1, first=50)
    again = SiteText(one, private)  # as after a new start, for which the text is counted again
    more = again.introduce(TOKENIZER.definition)
    assert more > len(first) and np.array_equal(again.of(job(), 0).tokens, first)
    (told,) = Path(one.runs).rglob(OF_RUN)
    told.unlink()  # its owner deletes the state of the run
    write_text(texts.of("ann"), "ann", 1, first=60)
    again.introduce(TOKENIZER.definition)
    assert len([name for name in entries(one) if not name.endswith(".lock")]) == 1


def lose(path: Path) -> None:
    path.unlink()


def damage(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def exchange(path: Path) -> None:
    path.write_text(OTHER.definition)


@pytest.mark.parametrize("harm", [lose, damage, exchange])
def test_a_tokenizer_that_is_gone_is_reported_and_comes_back_with_the_question(texts, harm):
    one = site(texts)
    SiteText(one, options(texts)).introduce(TOKENIZER.definition)
    (path,) = Path(one.state_dir).glob("tokenizers/*/tokenizer.json")
    harm(path)
    text = SiteText(one, options(texts))
    with pytest.raises(PartMissing, match="has the run's tokenizer no more, or it is damaged"):
        text.of(job(), 0)
    text.introduce(TOKENIZER.definition)
    assert len(text.of(job(), 0).tokens)
    assert SiteText(one, options(texts)).of(job(), 0)


def test_the_tokenizer_of_a_pretrained_model_is_kept_with_its_settings(texts, tmp_path):
    """In one file, so that a restarted site has all of it, and nothing of it is executed."""
    one, name = site(texts), "smollm"
    tokenizer = load_tokenizer(FAMILIES[name].write(tmp_path / name))
    SiteText(one, options(texts)).introduce(tokenizer.definition)
    text = SiteText(one, options(texts))
    tokens = text.of(job(tokenizer), 0).tokens
    assert len(tokens) and (tokens == tokenizer.end).sum() == len(
        list(texts.of("ann").rglob("*.*"))
    )
    assert text.tokenizer.definition == tokenizer.definition
    assert text.tokenizer.chat_template == tokenizer.chat_template
    for wrong in ('{"tokenizer.json": 3}', '{"tokenizer.json": "{}", "../x": "a"}'):
        with pytest.raises(FedGPTError, match="the server's tokenizer cannot be read"):
            text.introduce(wrong)


def test_tokenizers_that_no_run_has_used_for_a_month_go(texts):
    one = site(texts)
    for tokenizer in (TOKENIZER, OTHER):
        SiteText(one, options(texts)).introduce(tokenizer.definition)
    folder = Path(one.state_dir) / "tokenizers"
    third, mine = folder / ("0" * 16), folder / "mine"
    for each in (third, mine):
        each.mkdir()
        (each / "tokenizer.json").write_text("{}")
    (third / "notes.txt").write_text("of the owner")
    before = time.time() - KEEP_SECONDS - 60
    for path in folder.glob("*/*"):
        os.utime(path, (before, before))
    text = SiteText(one, options(texts))
    text.of(job(OTHER), 0)  # it is in use again
    text.introduce(TOKENIZER.definition)
    left = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
    wanted = {f"{one.digest}/tokenizer.json" for one in (TOKENIZER, OTHER)}
    assert left == wanted | {f"{third.name}/notes.txt", "mine/tokenizer.json"}
