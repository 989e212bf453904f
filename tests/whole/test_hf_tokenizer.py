"""Runs whose tokenizer is that of a pretrained model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.advice import advises
from support.here import run_here, tiny_run
from support.refused import problems
from support.tokenizer_families import FAMILIES

from fedgpt import api
from fedgpt.config import compose
from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import CorpusOptions, TokenizerOptions
from fedgpt.data.prepare import prepare
from fedgpt.data.tokenizer import load_tokenizer

SMOL = FAMILIES["smollm"]


def test_a_run_takes_a_tokenizer_as_it_is_and_trains_none(tmp_path, capfd):
    folder = SMOL.write(tmp_path / "smol")
    words = [*tiny_run(tmp_path), "corpus.public=0", "tokenizer=hf", f"tokenizer.path={folder}"]
    words += ["evaluate.samples=1", "evaluate.sample_tokens=4"]
    run_here(*words, "rounds=2")
    printed = "".join(capfd.readouterr())
    assert f"tokenizer  hf, {load_tokenizer(folder).vocab_size} entries, of {folder}" in printed
    assert (
        f"tokenizer.path={folder}: the tokenizer has no token for the bytes 04 1d f1 f2" in printed
    )
    assert "trained on the public part" not in printed
    run = tmp_path / "run"
    kept = load_tokenizer(run / "model")
    assert (kept.digest, kept.end) == (load_tokenizer(folder).digest, 2)
    assert kept.chat_template == SMOL.template
    settings = json.loads((run / "model" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16
    assert api.open_run(run).tokenizer.digest == kept.digest
    # the run that starts from this one takes its tokenizer
    start = [*words, f"init_from={run}", f"run_dir={tmp_path / 'next'}"]
    run_here(*start, f"tokenizer.path={run}", "rounds=1")
    # and it goes on with its own alone
    shutil.move(folder, tmp_path / "away")
    replace(SMOL, steps=FAMILIES["gpt2"].steps).write(folder)
    with pytest.raises(FedGPTError, match="has another tokenizer than at the start") as refused:
        api.run(f"resume={run}", "rounds=3")
    advises(refused.value, "restore that folder")
    shutil.rmtree(folder)
    shutil.move(tmp_path / "away", folder)
    assert api.run(f"resume={run}", "rounds=3").summary["versions"] == 3


def test_text_is_prepared_once_for_a_tokenizer_wherever_it_is(tmp_path):
    path = tmp_path / "text"
    path.mkdir()
    for page in range(40):
        (path / f"{page}.txt").write_text(f"On page {page} the river rose <|im_end|> again." * 3)
    corpus = CorpusOptions(name="files", client="file", path=str(path), public=0.0)
    other = replace(SMOL, template="{{ messages }}")

    def prepared(name: str, family=SMOL):
        options = TokenizerOptions("hf", path=str(family.write(tmp_path / name)))
        return prepare(corpus, options, tmp_path / "cache")

    one, two, chat = prepared("one"), prepared("two"), prepared("chat", other)
    assert one.digest == two.digest == chat.digest
    assert one.folder == two.folder
    assert chat.tokenizer.chat_template == "{{ messages }}", "not that of the entry"
    assert prepared("digits", FAMILIES["gpt2"]).digest != one.digest
    assert (one.tokens[one.starts[1:] - 1] == one.tokenizer.end).all()
    assert (one.tokens == one.tokenizer.end).sum() == 40, "none of them is of a text"
    assert one.manifest["split"]["public"]["documents"] == 0


def test_a_wrong_folder_is_one_problem_among_the_others(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    words = ["tokenizer=hf", f"tokenizer.path={tmp_path}", "rounds=0"]
    [first, second] = sorted(problems(*words))
    assert first.startswith("rounds=0: must be at least 1")
    assert second.startswith(f"tokenizer.path={tmp_path}: tokenizer.json: no tokenizer that fedgpt")
    [problem] = problems("tokenizer=hf")
    assert problem.startswith("tokenizer.path is not set: tokenizer=hf needs the folder")
    [problem] = problems("tokenizer=hf", "tokenizer.path=https://huggingface.co/gpt2")
    assert "is an address, and fedgpt fetches nothing" in problem
    [problem] = problems("tokenizer=bytes", f"tokenizer.path={tmp_path}")
    assert problem.endswith("has no effect with tokenizer=bytes; add tokenizer=hf, or leave it out")


def test_a_run_of_sites_needs_no_public_text_for_it(tmp_path):
    folder = SMOL.write(tmp_path / "smol")
    (tmp_path / "held.txt").write_text("The river rose.")
    words = ["corpus=site", f"corpus.held_out_path={tmp_path / 'held.txt'}", "pace.begin=2"]
    assert any("corpus.public_path is not set" in one for one in problems(*words))
    compose.load([*words, "tokenizer=hf", f"tokenizer.path={folder}", f"run_dir={tmp_path}/run"])


def test_the_vocabulary_counts_for_the_memory_of_the_model(tmp_path):
    folder: Path = SMOL.write(tmp_path)
    words = ["tokenizer=hf", f"tokenizer.path={folder}", "model.n_embd=1000000", "model.n_layer=9"]
    [problem] = [one for one in problems(*words) if "parameters need at least" in one]
    assert problem.startswith("model.n_embd=1000000 and model.n_layer=9")
