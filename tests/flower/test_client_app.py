"""The ClientApp: which client a SuperNode is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from support.advice import advises
from support.here import tiny_model, tiny_run
from support.sites import Texts

from fedgpt.client import limits
from fedgpt.client.policy import PolicyRefused
from fedgpt.client.texts import CommonText
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.config.of_server import options_of_server
from fedgpt.core.errors import ConfigError, FedGPTError, ForServer
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import RunOptions
from fedgpt.flower import client_app, run_config
from fedgpt.flower.finished import ACTION
from fedgpt.flower.in_process_grid import InProcessGrid
from fedgpt.flower.local_grid import FIRST_NODE
from fedgpt.flower.messages import (
    job_content,
    question_content,
    read_info,
    read_reply,
    vector_record,
)
from fedgpt.flower.reported import ClientFailed, reported
from fedgpt.flower.run_config import options_of_server_run, run_config_of


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"partition-id": 7, "num-partitions": 2}, "partition-id=7: must be from 0 to 1, as the"),
        ({"partition-id": -1, "num-partitions": 2}, "partition-id=-1: must be from 0 to 1"),
        ({"partition-id": 0, "num-partitions": 5}, "num-partitions=5: the run has 2 clients"),
        ({"partition-id": "first", "num-partitions": 2}, "'first' is not a whole number"),
        ({"num-partitions": 2}, "partition-id: is missing"),
    ],
)
def test_a_node_with_a_wrong_number_is_refused_with_its_option(tmp_path, config, message):
    answer = asked(compose.load(tiny_run(tmp_path)), config)
    with pytest.raises(ConfigError, match=message):
        read_info(answer)


def asked(
    options: RunOptions,
    config: dict[str, Any],
    question: RecordDict | None = None,
    kind: str = "query",
) -> Message:
    """What a SuperNode with this --node-config answers to the question which client it is."""
    content = question or RecordDict()
    request = make_message(Metadata(1, "", 0, 1, "", "", 0.0, 60.0, kind), content)
    context = Context(1, 7, config, RecordDict(), run_config_of(options))
    return client_app.app(request, context)


FOUR = ["partition=iid", "partition.clients=4", "partition.piece=64"]
# --node-config -> the advice, and what is done
NODE_REMEDIES = [
    (
        {"partition-id": 2, "num-partitions": 2},
        "start each SuperNode with another of these numbers",
        [({"partition-id": 0}, []), ({"partition-id": 1}, [])],
    ),
    (
        {"partition-id": 1, "num-partitions": 4},
        "start every SuperNode with num-partitions=2, or change partition.clients",
        [({"num-partitions": 2}, []), ({}, FOUR)],
    ),
    (
        {"num-partitions": 2},
        "start the SuperNode with --node-config 'partition-id=0 num-partitions=2', for example",
        [({"partition-id": 0, "num-partitions": 2}, [])],
    ),
]


@pytest.mark.parametrize(("config", "remedy", "followed"), NODE_REMEDIES)
def test_a_node_that_is_started_as_its_refusal_advises_is_a_client(
    tmp_path, config, remedy, followed
):
    words = tiny_run(tmp_path)
    with pytest.raises(ConfigError) as refused:
        read_info(asked(compose.load(words), config))
    assert remedy in str(refused.value)
    for change, more in followed:
        assert read_info(asked(compose.load([*words, *more]), config | change))


@pytest.mark.parametrize("allocate", [torch.empty, np.ones], ids=["torch", "numpy"])
def test_a_client_without_memory_says_what_to_lower(tmp_path, allocate):
    words = tiny_run(tmp_path)
    work = ClientWork(compose.load(words), str(tmp_path))
    told = pytest.raises(FedGPTError, match=r"^out of memory \(cpu\); lower model\.block_size=16, ")
    with told as error, reported(work):
        allocate(1 << 46)
    advises(
        error.value,
        "lower model.block_size=16, model.n_layer=1 or model.n_embd=16, or raise memory in the"
        " site's policy",
    )
    compose.load([*words, "model.block_size=8", "model.n_embd=8"])
    private = ClientWork(compose.load([*words, "privacy=local"]), str(tmp_path))
    # the message says nothing of the text
    told = pytest.raises(ForServer, match=r"^out of memory \(cpu\); lower model")
    with told, reported(private):
        allocate(1 << 46)
    failed = pytest.raises(ClientFailed, match=r"^ZeroDivisionError \(the client's log")
    with failed, reported(work):
        raise ZeroDivisionError


CANARY = "zanzibar"


def _no_field(records: Path) -> None:
    records.write_text(json.dumps({CANARY: "no other field"}) + "\n")


def _not_text(records: Path) -> None:
    records.write_text(json.dumps({"author": "ann", "text": [CANARY]}) + "\n")


def _cut_off(records: Path) -> None:
    records.write_text(f'{{"author": "{CANARY}", "text"')


def _fine(records: Path) -> None:
    lines = (
        {"author": author, "text": f"{CANARY} of {author}, page {page}. " * 20}
        for author in ("ann", "bob")
        for page in range(5)
    )
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("written", "kind", "unit"),
    [
        *((written, "query", "example") for written in (_no_field, _not_text, _cut_off)),
        (_no_field, "train", "local"),
        (_not_text, "query", "local"),
        (_fine, "train", "example"),
        *((written, "query", "client") for written in (_no_field, _not_text, _cut_off)),
        (_not_text, "train", "client"),
    ],
)
def test_no_error_of_a_private_client_tells_of_its_text_or_files(
    tmp_path, written, kind, unit, capfd
):
    """With `_fine` text, a job without noise is refused; its own output has all reasons."""
    written(tmp_path / f"{CANARY}.jsonl")
    options = compose.load(
        [
            *tiny_model(),
            "corpus=files",
            "corpus.client=author",
            f"corpus.path={tmp_path / CANARY}.jsonl",
            f"cache_dir={tmp_path / CANARY}",
            f"privacy={unit}",
        ]
    )
    grid = InProcessGrid(client_app.app, 2, run_config_of(options), str(tmp_path / CANARY))
    job = Job("ann", 0, 0, np.zeros(10, np.float32), Plan("run", 1, 0, 32, 1000))
    content = job_content(job, vector_record(job.params)) if kind == "train" else RecordDict()
    (sent,) = grid.push_messages([Message(content, FIRST_NODE, kind)])
    grid.wait()
    (reply,) = grid.pull_messages([sent])
    told = read_reply(reply, "ann", 0).error
    assert "ClientFailed: " in told and CANARY not in told and str(tmp_path) not in told
    assert ("the job has noise 0" if written is _fine else CANARY) in capfd.readouterr().err


def test_a_node_takes_part_only_in_runs_of_its_kind(tmp_path):
    texts = Texts.write(tmp_path)
    site, common = compose.load(texts.at_sites()), compose.load(tiny_run(tmp_path / "common"))
    numbered = {"partition-id": 0, "num-partitions": 2}
    with pytest.raises(ConfigError) as refused:
        read_info(asked(site, numbered))
    advises(
        refused.value,
        "start the SuperNode with --node-config"
        ' \'name="NAME" text="FOLDER" state-dir="FOLDER"\', or use fedgpt client',
    )
    tokenizer = CommonText(site).tokenizer
    question = question_content(tokenizer.definition)
    told = read_info(asked(site, texts.config("ann"), question))
    assert told.info.id == "ann" and told.digest == tokenizer.digest
    with pytest.raises(ConfigError, match="the server names the text of this run") as refused:
        read_info(asked(common, texts.config("ann")))
    advises(refused.value, "use corpus=site")
    assert read_info(asked(common, numbered))


def test_a_site_reads_no_overrides_of_a_server(tmp_path):
    texts = Texts.write(tmp_path)
    overrides = {"config": "", "overrides": " ".join(texts.at_sites())}
    with pytest.raises(ConfigError) as refused:
        options_of_server_run(overrides)
    advises(refused.value, "start it with fedgpt server or fedgpt submit")
    sent = run_config_of(compose.load(texts.at_sites()))
    assert options_of_server_run(sent).corpus.at_sites


def test_options_are_read_once_for_all_messages_of_a_run_also_wrong_ones(monkeypatch):
    read: list[str] = []

    def reads(text: str) -> RunOptions:
        read.append(text)
        return options_of_server(text)

    monkeypatch.setattr(run_config, "options_of_server", reads)
    wrong = {"config": "corpus: {name: site}\nrounds: -7"}
    for _ in range(2):
        with pytest.raises(ConfigError, match="rounds=-7"):
            options_of_server_run(wrong)
    assert len(read) == 1


def test_a_site_says_how_much_text_it_has_and_in_a_private_run_less_exactly(tmp_path):
    texts = Texts.write(tmp_path)
    tokens = {}
    for unit in ("none", "example", "client", "local"):
        options = compose.load(texts.at_sites(f"privacy={unit}", "pace.clients=0"))
        question = question_content(CommonText(options).tokenizer.definition)
        tokens[unit] = read_info(asked(options, texts.config("eve"), question)).info.tokens
    exact = tokens.pop("none")
    (rounded,) = set(tokens.values())
    assert rounded <= exact < 2 * rounded and rounded.bit_count() == 1 and rounded != exact


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"state-dir": ""},
        {"device": "tpu"},
        {"bad-records": "drop"},
        {"document-bytes": 3},
        {"text-field": 3},
    ],
)
def test_a_wrong_configuration_of_a_site_is_named(tmp_path, change):
    texts = Texts.write(tmp_path)
    options = compose.load(texts.at_sites())
    question = question_content(CommonText(options).tokenizer.definition)
    with pytest.raises(ConfigError, match=f"--node-config {next(iter(change))}"):
        read_info(asked(options, texts.config("ann") | change, question))


def test_a_site_whose_disk_is_almost_full_keeps_nothing_of_a_server_and_says_so(
    tmp_path, monkeypatch
):
    """A server may send any number of runs, tokenizers and models."""
    texts = Texts.write(tmp_path)
    options = compose.load(texts.at_sites())
    question = question_content(CommonText(options).tokenizer.definition)
    monkeypatch.setattr(limits, "LEAST_FREE", 1 << 60)
    job = Job("ann", 0, 0, np.zeros(10, np.float32), Plan("run", 1, 0, 32, 1000))
    model = RecordDict({"files": vector_record(job.params), "run": ConfigRecord({"id": "run"})})
    messages = {
        "query": question,
        "train": job_content(job, vector_record(job.params)),
        f"query.{ACTION}": model,
    }
    for kind, content in messages.items():
        with pytest.raises(PolicyRefused, match="its disk for other uses, and they are all that"):
            asked(options, texts.config("ann"), content, kind)
    assert not (tmp_path / "state").exists()
    monkeypatch.undo()
    assert read_info(asked(options, texts.config("ann"), question)).info.id == "ann"


@pytest.mark.parametrize("what", ["no folder", "too little", "a wrong tokenizer", "no tokenizer"])
def test_what_a_site_cannot_do_is_told_without_its_words_and_paths(tmp_path, caplog, what):
    texts = Texts.write(tmp_path)
    options = compose.load(texts.at_sites())
    definition = CommonText(options).tokenizer.definition
    config, question = texts.config("ann"), question_content(definition)
    if what == "no folder":
        config["text"] = str(tmp_path / CANARY)
    elif what == "too little":
        config["text"] = str(tmp_path / "little" / f"{CANARY}.txt")
        (tmp_path / "little").mkdir()
        Path(config["text"]).write_text(CANARY)
    elif what == "a wrong tokenizer":
        question = question_content("{}")
    else:
        question = RecordDict()
    with pytest.raises(Exception) as told:
        asked(options, config, question)
    assert "(the client's log has its message)" in str(told.value)
    assert CANARY not in str(told.value) and str(tmp_path) not in str(told.value)
