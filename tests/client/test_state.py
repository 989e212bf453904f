"""Client state: the job that a job starts from, and what happens where its state is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.advice import advises
from support.disk import largest_file
from support.here import tiny_run

from fedgpt.client.state import ClientStore
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.errors import FedGPTError
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Job, Plan
from fedgpt.model.gpt import GPT

STEP_TOKENS = 2 * 16


class Client:
    """Ann, whose jobs all have the same model."""

    def __init__(self, work: ClientWork, states: Path):
        self.work, self.states, self.name = work, states, work.texts.shards[0].client
        self.params = flatten(GPT(work.options.model, 257))[1].numpy()

    def train(self, number: int, state_job: int) -> tuple[np.ndarray, float]:
        """Do a job that starts from the state of `state_job`: (what it sends, its `state_lost`)."""
        plan = Plan("run", 2, 64, STEP_TOKENS, 640, state_job=state_job, keep=(0, 1))
        job = Job(self.name, number, 0, self.params, plan)
        header, array = self.work.train(job, 0)
        return array.copy(), json.loads(header)["metrics"]["state_lost"]

    def state(self, number: int) -> Path:
        return ClientStore(self.states, "run", self.name)._path(number)


KEPT = ["local.moments=keep", "model.dropout=0.2"]


@pytest.fixture(params=[KEPT, ["local=reset", "update=topk"]], ids=" ".join)
def client(request, tmp_path) -> Client:
    """With Adam's moments as its state, and with the residual of error feedback."""
    options = compose.load([*tiny_run(tmp_path), *request.param])
    return Client(ClientWork(options, str(tmp_path / "clients")), tmp_path / "clients")


def test_a_job_starts_from_the_state_of_the_job_that_it_names(client):
    """The job between them was rejected: it changes nothing. Neither does the first try."""
    client.train(0, -1)
    first, lost = client.train(2, 0)
    assert not lost
    client.train(1, 0)
    again, _ = client.train(2, 0)
    assert np.array_equal(first, again)
    for other in (1, -1):
        assert not np.array_equal(first, client.train(2, other)[0]), "the state has an effect"


@pytest.mark.parametrize("left", [None, 0, 50, 300])
def test_a_client_that_has_lost_its_state_starts_anew_and_says_so(client, left):
    """As after a power cut: the file is missing, or only its first bytes are there."""
    client.train(0, -1)
    new, lost = client.train(1, -1)
    assert not lost, "a first job has none"
    path = client.state(0)
    content = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(content[:left])
    sent, lost = client.train(1, 0)
    assert np.array_equal(sent, new) and lost == 1


def test_a_state_is_not_synced_to_the_disk(client, monkeypatch):
    client.train(0, -1)  # prepares the text, whose files are
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    client.train(1, 0)
    assert client.state(1).exists() and not synced


@pytest.mark.parametrize("size", [0, 100, 20_000])
def test_on_a_full_disk_a_job_fails_with_one_message_and_can_be_repeated(client, size):
    message = f"the client's state cannot be written in {client.state(0).parent}.*too large.*room"
    with largest_file(size), pytest.raises(FedGPTError, match=message) as failed:
        client.train(0, -1)
    advises(failed.value, "make room there")
    assert not client.state(0).exists()
    sent, _ = client.train(0, -1)
    assert client.state(0).exists()
    client.state(0).unlink()
    assert np.array_equal(sent, client.train(0, -1)[0])


def test_a_state_that_cannot_be_written_leaves_the_earlier_one(client):
    """As if the process is killed meanwhile: the job, done again, writes the same file."""
    client.train(0, -1)
    path = client.state(0)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}

    with largest_file(100), pytest.raises(FedGPTError, match="cannot be written"):
        client.train(0, -1)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_an_interrupted_write_leaves_the_earlier_state(client):
    client.train(0, -1)
    path = client.state(0)
    before = path.read_bytes()
    store = ClientStore(client.states, "run", client.name)
    with pytest.raises(KeyboardInterrupt), store._writing(path) as temporary:
        temporary.write_bytes(before[:50])
        raise KeyboardInterrupt
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_only_states_that_no_later_job_can_start_from_are_deleted(client):
    """Every job here says that a restart may need those of the jobs 0 and 1."""
    for number in range(5):
        client.train(number, number - 1)
    client.train(2, 1)  # a job that is done again leaves the state of a later one
    kept = {path.name for path in client.state(0).parent.iterdir()}
    assert kept == {f"task-{number}.safetensors" for number in (0, 1, 2, 4)}
