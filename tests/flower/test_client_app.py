"""The ClientApp: which client a SuperNode is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from support.advice import advises
from support.here import tiny_model, tiny_run

from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import RunOptions
from fedgpt.flower import client_app
from fedgpt.flower.in_process_grid import InProcessGrid
from fedgpt.flower.local_grid import FIRST_NODE
from fedgpt.flower.messages import job_content, read_info, read_reply, vector_record
from fedgpt.flower.run_config import run_config_of


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


def asked(options: RunOptions, config: dict[str, Any]) -> Message:
    """What a SuperNode with this --node-config answers to the question which client it is."""
    request = make_message(Metadata(1, "", 0, 1, "", "", 0.0, 60.0, "query"), RecordDict())
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
    work = ClientWork(compose.load([*words, "local.batch_size=32"]), str(tmp_path))
    told = pytest.raises(FedGPTError, match=r"^out of memory; lower local\.batch_size=32, and")
    with told as error, client_app._reported(work):
        allocate(1 << 46)
    advises(error.value, "lower local.batch_size=32, and raise local.accumulate instead")
    compose.load([*words, "local.batch_size=16", "local.accumulate=2"])
    private = ClientWork(compose.load([*words, "privacy=local"]), str(tmp_path))
    failed = pytest.raises(client_app.ClientFailed, match=r"^OutOfMemory \(the client's log has")
    with failed, client_app._reported(private):
        allocate(1 << 46)
    failed = pytest.raises(client_app.ClientFailed, match=r"^ZeroDivisionError \(the client's log")
    with failed, client_app._reported(work):
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
