"""Text that the server owns: public and held-out text in folders of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.sites import NAMES, Texts

from fedgpt.config.compose import load
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.data.corpora.base import CLIENTS, HELD_OUT, PUBLIC, Corpus, Document
from fedgpt.data.corpus import read_documents
from fedgpt.data.prepare import Prepared, prepare, prepare_own
from fedgpt.data.shards import load_shards
from fedgpt.data.tokenizer import Tokenizer

BPE = TokenizerOptions(name="bpe", vocab_size=300)


@pytest.fixture
def texts(tmp_path) -> Texts:
    return Texts.write(tmp_path)


def own(texts: Texts, **more: str) -> dict[str, str]:
    """The options of the server's own text."""
    folders = {f"{part}_path": str(texts.folder / part) for part in ("public", "held_out")}
    return folders | more


def words_of(prepared: Prepared, part: int) -> str:
    chosen = np.flatnonzero(prepared.part == part)
    spans = [prepared.tokens[prepared.starts[d] : prepared.starts[d + 1]] for d in chosen]
    return "".join(prepared.tokenizer.decode(span) for span in spans)


def words_in(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.rglob("*.txt")))


def test_a_server_of_sites_has_its_own_text_and_no_client(texts, tmp_path):
    words = texts.at_sites(f"cache_dir={tmp_path / 'cache'}")
    prepared, shards = load_shards(load(words))
    assert shards == [] and not (prepared.part == CLIENTS).any()
    assert words_of(prepared, PUBLIC) == words_in(texts.folder / "public")
    assert words_of(prepared, HELD_OUT) == words_in(texts.folder / "held_out")
    assert prepared.tokenizer.name == "bpe" and prepared.manifest["client"] == "site"


def test_text_with_parts_of_its_own_gives_the_rest_to_its_owners(texts, tmp_path):
    options = CorpusOptions(name="files", client="folder", path=str(texts.folder / "sites"))
    options = CorpusOptions(**{**vars(options), **own(texts)})
    prepared = prepare(options, BPE, tmp_path / "cache")
    assert words_of(prepared, CLIENTS) == words_in(texts.folder / "sites")
    assert words_of(prepared, HELD_OUT) == words_in(texts.folder / "held_out")
    owners = prepared.clients[prepared.part == CLIENTS].sorted()[0]
    assert owners == list(NAMES)


def test_a_part_without_a_folder_is_a_share_of_the_other_text(texts, tmp_path):
    whole = CorpusOptions(name="files", client="folder", path=str(texts.folder / "sites"))
    whole = CorpusOptions(**{**vars(whole), "public": 0.3})
    named = CorpusOptions(**{**vars(whole), "held_out_path": own(texts)["held_out_path"]})
    prepared = prepare(named, BPE, tmp_path / "cache")
    assert words_of(prepared, HELD_OUT) == words_in(texts.folder / "held_out")
    # as without the folder: the share is of the text that is divided
    assert words_of(prepared, PUBLIC) == words_of(prepare(whole, BPE, tmp_path / "cache"), PUBLIC)


def test_the_folder_of_a_part_is_in_the_name_of_the_cache_entry(texts, tmp_path):
    """The same documents in other parts are another entry."""
    options = [
        CorpusOptions(name="site", public_path=str(texts.folder / one), held_out_path=str(other))
        for one, other in (
            ("public", texts.folder / "held_out"),
            ("held_out", texts.folder / "public"),
        )
    ]
    first, second = (prepare(one, BPE, tmp_path / "cache") for one in options)
    assert first.digest != second.digest


def test_a_site_has_the_tokens_of_the_same_text_in_one_place(texts, tmp_path):
    corpus = ["corpus=files", "corpus.client=folder", f"corpus.path={texts.folder / 'sites'}"]
    words = [*corpus, *texts.own, f"cache_dir={tmp_path / 'cache'}"]
    prepared, shards = load_shards(load(words))
    for shard in shards:
        options = CorpusOptions(name="files", client="file", path=str(texts.of(shard.client)))
        alone = prepare_own(options, prepared.tokenizer, tmp_path / "elsewhere")
        assert np.array_equal(alone.tokens, shard.read(prepared.tokens))
        assert (alone.part == CLIENTS).all()
        again = prepare_own(options, prepared.tokenizer, tmp_path / "elsewhere")
        assert again.folder == alone.folder


def test_an_entry_belongs_to_one_tokenizer(texts, tmp_path):
    options = CorpusOptions(name="files", client="file", path=str(texts.of("ann")))
    definitions = [
        prepare(CorpusOptions(name="site", **own(texts)), tokenizer, tmp_path).tokenizer.definition
        for tokenizer in (BPE, TokenizerOptions(name="bytes"))
    ]
    entries = [prepare_own(options, Tokenizer(one), tmp_path) for one in definitions]
    assert entries[0].digest != entries[1].digest
    assert entries[0].starts[-1] < entries[1].starts[-1]


class Named(Corpus):
    """One document in a part that does not exist."""

    def documents(self) -> list[Document]:
        return [Document("ann", "1", "some words", part="privat")]


def test_a_part_with_a_wrong_name_is_refused():
    with pytest.raises(ConfigError, match="part='privat'; it must be public, held_out, clients"):
        list(read_documents(Named()))


# what is typed besides the options of a run of sites -> (problem, advice, words that follow it)
SITE_REMEDIES = {
    "corpus.path=/x": ("has no effect with corpus=site", "or leave it out", []),
    "corpus.held_out_path=null": (
        "is not set: with corpus=site the clients' text never reaches the server",
        "name a folder or file",
        ["corpus.held_out_path=."],
    ),
    "corpus.public_path=null": (
        "is not set: tokenizer=bpe is trained on the public text",
        "name a folder or file, or take tokenizer=bytes",
        ["corpus.public_path=null", "tokenizer=bytes", "~tokenizer.vocab_size"],
    ),
    "pace.begin=null": (
        "is not set: with corpus=site nobody knows how many clients there are",
        "say how many must be connected before the run begins, such as pace.begin=3",
        ["pace.begin=3"],
    ),
    "pace.begin=0": ("must be at least 1", "", ["pace.begin=1"]),
    "partition=iid": ("has no effect with corpus=site", "or leave it out", []),
    "partition.clients=3": ("has no effect with corpus=site", "or leave it out", []),
    "corpus.held_out=0.1": ("has no effect with corpus.held_out_path=", "or leave it out", []),
    "clock=virtual": ("simulates clients, and those of corpus=site are real", "", ["clock=real"]),
    "fleet=constant": ("simulates clients, and those of corpus=site are real", "", ["fleet=none"]),
    "attack=sign_flip": ("only for simulated clients", "", []),
    "checkpoint.journal=false": ("corpus=site needs the journal", "leave it out", []),
}
WITH = {"attack=sign_flip": ["attack.clients=1"]}


@pytest.mark.parametrize("typed", SITE_REMEDIES)
def test_what_sites_cannot_have_is_refused_and_the_remedy_helps(texts, typed):
    problem, advice, words = SITE_REMEDIES[typed]
    with pytest.raises(ConfigError) as refused:
        load(texts.at_sites(typed, *WITH.get(typed, [])))
    assert problem in str(refused.value) and advice in str(refused.value)
    own = [
        word for word in texts.own if not any(word.startswith(w[1:]) for w in words if w[0] == "~")
    ]
    words = [word for word in words if word[0] != "~"]
    assert load(["corpus=site", "pace.begin=3", *own, *words]).corpus.at_sites


def test_only_runs_of_sites_wait_for_a_number_of_clients():
    with pytest.raises(ConfigError, match=r"pace\.begin=2: only corpus=site has clients that join"):
        load(["pace.begin=2"])


def test_a_run_of_sites_is_not_started_here(texts, tmp_path):
    from fedgpt.api import run

    with pytest.raises(ConfigError, match=r"so the run needs a server .*; to simulate it here"):
        run(*texts.at_sites(f"run_dir={tmp_path / 'run'}"))
    assert not (tmp_path / "run").exists()
