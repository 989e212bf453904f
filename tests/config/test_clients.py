"""Options that need other clients or more public text are refused when the text has been read."""

from __future__ import annotations

import pytest
from support.advice import advises
from support.here import tiny_run

from fedgpt.config import compose
from fedgpt.config.clients import client_problems
from fedgpt.data.shards import load_shards

FLTRUST = ["strategy=fltrust", "corpus.public=0.01", "model.block_size=1000"]
KRUM = ["strategy=krum", "pace.clients=0"]
# options of a run of two clients -> the problem, and options with which there is none
CLIENT_REMEDIES = {
    "strategy.attackers=1 needs at least 5 updates a server step and pace=cohort waits for 2: raise"
    " partition.clients of partition=iid, or take strategy=median": (
        KRUM,
        ["partition=iid", "partition.clients=5", "partition.piece=64"],
    ),
    "strategy=median needs at least 3 updates a server step and pace=cohort waits for 2: raise"
    " partition.clients of partition=iid, or take strategy=fedavg": (
        ["strategy=median"],  # of the 8 clients of pace.clients there are 2
        ["strategy=fedavg"],
    ),
    "strategy=median needs at least 3 updates a server step and pace=cohort waits for 1: raise"
    " pace.rate and partition.clients of partition=iid, or take strategy=fedavg": (
        ["strategy=median", "pace.rate=0.5"],
        ["pace.rate=1", "partition=iid", "partition.clients=3"],
    ),
    "attack.clients=3: is above the number of clients, 2; lower it": (
        ["attack=scale", "attack.clients=3"],
        ["attack.clients=2"],
    ),
    "pace.minimum=3: is above the number of clients, 2; lower it": (
        ["pace.minimum=3"],
        ["pace.minimum=2"],
    ),
    "pace.goal=3: is above the number of clients, 2; lower it": (["pace.goal=3"], ["pace.goal=2"]),
    "pace.minimum=9: is above the number of clients, 2; lower it": (
        ["pace.rate=0.5", "pace.minimum=9"],
        ["pace.rate=0.5", "pace.minimum=2"],
    ),
    "corpus.public=0.01: 614 tokens are public, and the server's own update needs more than"
    " model.block_size=1000; raise corpus.public, or lower model.block_size": (
        FLTRUST,
        ["corpus.public=0.3"],
    ),
}


@pytest.mark.parametrize("problem", CLIENT_REMEDIES)
def test_a_problem_of_the_clients_is_named_and_its_remedy_helps(problem, tmp_path):
    text = tiny_run(tmp_path)
    wrong, remedy = CLIENT_REMEDIES[problem]
    assert problems(*text, *wrong) == [problem]
    assert problems(*text, *wrong, *remedy) == []


def test_public_text_as_long_as_a_window_is_enough_for_a_shorter_window(tmp_path):
    text = [*tiny_run(tmp_path), *FLTRUST]
    assert problems(*text, "model.block_size=613") == []
    assert len(problems(*text, "model.block_size=614")) == 1


def test_a_table_of_devices_must_have_every_client(tmp_path):
    text, table = tiny_run(tmp_path), tmp_path / "table.csv"
    trace = ["fleet=trace", f"fleet.path={table}"]
    table.write_text("client,step_seconds\nann,1\n")
    [problem] = problems(*text, *trace)
    advises(problem, "has no line for 1 of 2 clients: 'bob'; add their lines")
    table.write_text("client,step_seconds\nann,1\nbob,2\n")
    assert problems(*text, *trace) == []


def test_a_buffer_may_wait_for_more_updates_than_there_are_clients(tmp_path):
    buffer = ["strategy=fedbuff", "pace=buffer", "pace.goal=5"]
    assert problems(*tiny_run(tmp_path), *buffer) == []


def problems(*words: str) -> list[str]:
    """The problems of accepted options with the clients of their text."""
    options = compose.load(words)
    prepared, shards = load_shards(options)
    strategy = compose.build_strategy(options.strategy)
    names = [shard.client for shard in shards]
    return list(client_problems(options, strategy, prepared, names))
