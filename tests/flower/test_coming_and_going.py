"""Clients that come, go and come back, strangers and wrong answers, at a real SuperLink."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from support.advice import advises
from support.superlink import in_thread, next_message, send

from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.core.messages import ClientInfo, Job, Plan, Reply
from fedgpt.flower import grid_transport, nodes
from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.grid_transport import Admission, GridTransport
from fedgpt.flower.messages import info_content, read_job, refusal_content, update_content

PARAMS = np.arange(1000, dtype=np.float32)


@pytest.fixture
def transport(link) -> Iterator[Callable[[int], GridTransport]]:
    made = []

    def make(expected: int) -> GridTransport:
        made.append(GridTransport(link.grid(), Admission(expected, "digest")))
        return made[-1]

    yield make
    for one in made:
        one.close()


def answer(connection: FleetConnection, content: RecordDict) -> None:
    """Answer the server's next message."""
    question = next_message(connection)
    send(connection, Message(content, reply_to=question))


def work(connection: FleetConnection) -> Job:
    """Do the next job: the update is the model plus one."""
    message = next_message(connection)
    job = read_job(message)
    reply = Message(update_content(f'{{"task": {job.number}}}', job.params + 1), reply_to=message)
    send(connection, reply)
    return job


def client(name: str, digest: str = "digest") -> RecordDict:
    return info_content(ClientInfo(name, 10), digest)


def job(name: str, number: int = 0) -> Job:
    return Job(name, number, 3, PARAMS, Plan("run", 1, 0, 1, 1))


def joined(link, transport, *names: str) -> tuple[GridTransport, dict[str, FleetConnection]]:
    """A transport whose clients have joined, and their connections."""
    made = transport(len(names))
    connections = {name: link.node()[1] for name in names}
    for name, connection in connections.items():
        in_thread(lambda name=name, connection=connection: answer(connection, client(name)))
    assert [info.id for info in made.clients(timeout=20)] == sorted(names)
    return made, connections


def replies(made: GridTransport, count: int, seconds: float = 20.0) -> list[Reply]:
    found, deadline = [], time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += made.receive(0.2)
    return found


WRONG = {
    "another text": (client("eve", "other"), "client 'eve' prepared other data than the server"),
    "no answer that can be read": (RecordDict(), "its answer cannot be read"),
    "options that it refuses": (refusal_content(["model.n_layer=9: no"]), "model.n_layer=9: no"),
    "an earlier version of the messages": (
        RecordDict({**client("eve"), "who": ConfigRecord({"id": "eve", "digest": "digest"})}),
        "client 'eve' speaks version 0 of fedgpt's messages, this server version 2;",
    ),
    "another's name": (client("ann"), "says that it is client 'ann', as node"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_leaves_its_node_out_and_the_run_begins(link, transport, caplog, kind):
    """Whatever its node's id: the first `expected` nodes are not taken unasked."""
    made = transport(2)
    content, why = WRONG[kind]
    honest = {name: link.node()[1] for name in ("ann", "bob")}
    in_thread(lambda: answer(honest["ann"], client("ann")))
    wrong = in_thread(lambda: (time.sleep(0.5), answer(link.node()[1], content)))
    in_thread(lambda: (wrong.join(), time.sleep(0.5), answer(honest["bob"], client("bob"))))
    assert [info.id for info in made.clients(timeout=20)] == ["ann", "bob"]
    assert why in caplog.text and caplog.text.count("a node is left out") == 1
    if "version" in kind:  # as the two others have it
        advises(caplog.text, "install the same fedgpt at both")


def test_a_stranger_is_left_out_during_the_run(link, transport, caplog):
    made, connections = joined(link, transport, "ann")
    stranger = link.node()[1]
    asked = in_thread(lambda: answer(stranger, client("eve")))
    made.send([job("ann")])
    in_thread(lambda: (asked.join(), time.sleep(0.5), work(connections["ann"])))
    (reply,) = replies(made, 1)
    assert reply.client == "ann" and reply.payload.tolist() == (PARAMS + 1).tolist()
    assert "says that it is client 'eve'; the run has its 1 clients" in caplog.text


@pytest.mark.parametrize(
    "content, error, why",
    [
        (client("ann", "other"), FedGPTError, "prepared other data than the server"),
        (refusal_content(["model.n_layer=9: no"]), ConfigError, r"model\.n_layer=9"),
    ],
    ids=["another text", "refused options"],
)
def test_where_nobody_can_take_part_the_reason_is_told_at_once(
    link, transport, content, error, why
):
    made = transport(2)
    for _ in range(2):
        connection = link.node()[1]
        in_thread(lambda connection=connection: answer(connection, content))
    began = time.monotonic()
    with pytest.raises(error, match=why):
        made.clients(timeout=60)
    assert time.monotonic() - began < 30


def test_a_node_that_was_left_out_is_asked_again(link, transport, monkeypatch):
    """Its owner may have put the right text there."""
    monkeypatch.setattr(nodes, "ASK_AGAIN_SECONDS", 0.5)
    made, connection = transport(2), link.node()[1]
    other = link.node()[1]
    in_thread(lambda: answer(other, client("bob")))
    in_thread(lambda: (answer(connection, client("ann", "x")), answer(connection, client("ann"))))
    assert [info.id for info in made.clients(timeout=20)] == ["ann", "bob"]


def test_too_few_clients_end_the_wait_with_who_was_left_out(link, transport):
    made, connection = transport(2), link.node()[1]
    link.node()  # it answers nothing
    in_thread(lambda: answer(connection, RecordDict()))
    with pytest.raises(StoppedEarly) as caught:
        made.clients(timeout=3)
    text = str(caught.value)
    assert text.startswith("0 of 2 clients connected within 3 s; 1 node did not say")
    assert "left out: node" in text and "cannot be read" in text


def test_other_versions_are_noted(link, transport, caplog):
    answered = client("ann")
    answered["versions"] = ConfigRecord({"fedgpt": "0.0.1", "torch": "1.0"})
    made, connection = transport(1), link.node()[1]
    in_thread(lambda: answer(connection, answered))
    made.clients(timeout=20)
    assert "client ann has torch 1.0, the server " in caplog.text
    assert "client ann has fedgpt 0.0.1, the server " in caplog.text


def test_the_job_of_a_client_that_goes_away_is_sent_again_when_it_is_back(link, transport, caplog):
    """As after a cut of its link: no strike, and its update counts once."""
    caplog.set_level(logging.INFO)
    made, connections = joined(link, transport, "ann", "bob")
    made.send([job("ann"), job("bob")])
    first = read_job(next_message(connections["ann"]))
    node = connections["ann"]._node.node_id
    link.lose(node)
    in_thread(lambda: work(connections["bob"]))
    assert [reply.client for reply in replies(made, 1)] == ["bob"]
    while made.available("ann"):
        made.receive(0.1)
    assert "client ann is offline; its job 0 waits for it" in caplog.text
    assert made.receive(0.5) == []
    connections["ann"].heartbeat()
    again = []

    def come_back() -> None:
        answer(connections["ann"], client("ann"))
        again.append(work(connections["ann"]))

    in_thread(come_back)
    (reply,) = replies(made, 1)
    assert (reply.client, reply.number, reply.error) == ("ann", 0, "")
    assert made.available("ann") and (again[0].number, again[0].client) == (first.number, "ann")
    assert np.array_equal(again[0].params, first.params)
    assert made.receive(0.5) == []


def test_a_client_that_stays_away_is_a_failure_without_blame(link, transport, monkeypatch):
    monkeypatch.setattr(grid_transport, "PARKED_SECONDS", 1.0)
    made, connections = joined(link, transport, "ann")
    made.send([job("ann")])
    next_message(connections["ann"])
    link.lose(connections["ann"]._node.node_id)
    (reply,) = replies(made, 1)
    assert (reply.client, reply.number, reply.code) == ("ann", 0, "offline")
    assert reply.error == "the client was offline for 1 s"
    made.send([job("ann", 1)])  # it is parked at once
    assert replies(made, 1)[0].code == "offline"


def test_a_job_that_was_given_up_is_not_sent_again(link, transport):
    made, connections = joined(link, transport, "ann")
    made.send([job("ann")])
    next_message(connections["ann"])
    link.lose(connections["ann"]._node.node_id)
    while made.available("ann"):
        made.receive(0.1)
    made.abandon([("ann", 0)])
    connections["ann"].heartbeat()
    in_thread(lambda: answer(connections["ann"], client("ann")))
    deadline, found = time.monotonic() + 2, []
    while time.monotonic() < deadline:
        found += made.receive(0.2)
    # the SuperLink may have reported the loss after the list of nodes did
    assert all(reply.error.startswith("code 5") for reply in found)
    assert connections["ann"].receive() is None and made.available("ann")


def test_a_job_that_was_given_up_keeps_no_model_and_is_forgotten_with_its_message(link, transport):
    """A client may hang for ever: a server that runs for a month must not keep a model for it."""
    made, connections = joined(link, transport, "ann", "bob")
    made.ttl = 3.0
    models = [np.zeros(1000, np.float32) for _ in range(3)]
    freed = [weakref.ref(model) for model in models]
    jobs = [replace(job("ann", number), params=model) for number, model in enumerate(models)]
    del models
    for number in (0, 1):
        made.send([jobs.pop(0)])
        next_message(connections["ann"])
        made.abandon([("ann", number)])
    made.ttl = None
    made.send([replace(jobs.pop(0), client="bob")])  # the newest model is kept
    gc.collect()
    assert [one() is None for one in freed] == [True, True, False]
    late = replies(made, 2)
    assert sorted((one.client, one.number) for one in late) == [("ann", 0), ("ann", 1)]
    assert all(one.error for one in late)
    assert len(made._pending) == 1 and not made._abandoned, "bob's job"
    assert len(made._mailbox._fetcher._watched) == 1 and not made._mailbox._fetcher._cancelled


def test_a_client_that_comes_back_ends_the_wait_for_replies(link, transport):
    """It may get a job, although another client works for hours."""
    made, connections = joined(link, transport, "ann", "bob")
    link.lose(connections["ann"]._node.node_id)
    while made.available("ann"):
        made.receive(0.1)
    made.send([job("bob")])

    def come_back() -> None:
        time.sleep(1)
        connections["ann"].heartbeat()
        answer(connections["ann"], client("ann"))

    in_thread(come_back)
    began = time.monotonic()
    assert made.receive(60.0) == [] and time.monotonic() - began < 30
    assert made.available("ann")


def test_a_client_may_come_back_as_another_node(link, transport, caplog):
    """A SuperNode without a key has a new id at each start."""
    made, connections = joined(link, transport, "ann", "bob")
    link.lose(connections["ann"]._node.node_id)
    while made.available("ann"):
        made.receive(0.1)
    restarted = link.node()[1]
    in_thread(lambda: answer(restarted, client("ann")))
    while not made.available("ann"):
        assert made.receive(0.2) == []
    made.send([job("ann")])
    in_thread(lambda: work(restarted))
    assert [reply.client for reply in replies(made, 1)] == ["ann"]


def test_a_client_that_was_away_is_asked_again_before_its_next_job(link, transport, caplog):
    """Its program may be another one now; it keeps its place."""
    made, connections = joined(link, transport, "ann", "bob")
    ann = connections["ann"]
    link.lose(ann._node.node_id)
    while made.available("ann"):
        made.receive(0.1)
    made.send([job("ann")])  # it waits
    ann.heartbeat()
    while (question := ann.receive()) is None:
        assert made.receive(0.1) == []
    assert question.metadata.message_type == "query" and not made.available("ann")
    upgraded = client("ann")
    upgraded["versions"] = ConfigRecord({"fedgpt": "0.0.1", "torch": "1.0"})
    send(ann, Message(upgraded, reply_to=question))
    in_thread(lambda: work(ann))
    (reply,) = replies(made, 1)
    assert (reply.client, reply.number, reply.error) == ("ann", 0, "")
    assert "client ann has fedgpt 0.0.1, the server " in caplog.text
    assert made.newcomers() == []


def test_a_client_that_comes_back_with_another_program_waits_for_the_right_one(
    link, transport, caplog, monkeypatch
):
    monkeypatch.setattr(nodes, "ASK_AGAIN_SECONDS", 0.5)
    made, connections = joined(link, transport, "ann")
    ann = connections["ann"]
    link.lose(ann._node.node_id)
    while made.available("ann"):
        made.receive(0.1)
    ann.heartbeat()
    in_thread(lambda: (answer(ann, client("ann", "other")), answer(ann, client("ann"))))
    while "prepared other data" not in caplog.text:
        assert made.receive(0.1) == [] and not made.available("ann")
    while not made.available("ann"):
        made.receive(0.1)


def test_a_node_that_comes_back_as_another_client_is_not_sent_the_jobs_of_the_first(
    link, transport
):
    """As a SuperNode that is started again with another partition-id and the same key."""
    made, connections = joined(link, transport, "ann", "bob")
    for name in ("ann", "bob"):
        link.lose(connections[name]._node.node_id)
        while made.available(name):
            made.receive(0.1)
    connections["ann"].heartbeat()
    in_thread(lambda: answer(connections["ann"], client("bob")))
    while not made.available("bob"):
        assert made.receive(0.2) == []
    assert not made.available("ann")
    made.send([job("bob")])
    in_thread(lambda: work(connections["ann"]))
    assert [reply.client for reply in replies(made, 1)] == ["bob"]
