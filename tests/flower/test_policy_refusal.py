"""A site that refuses a job by its policy: the reason at the server, and the next attempt."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from flwr.app import Error, Message, MessageType, RecordDict
from support.superlink import in_thread, send

from fedgpt.client.policy import Policy, PolicyRefused
from fedgpt.core.errors import StoppedEarly
from fedgpt.core.messages import ClientInfo, Job, Plan, Reply
from fedgpt.core.options import RunOptions
from fedgpt.flower import grid_transport, messages, nodes
from fedgpt.flower.deploy.connection import UploadEnded
from fedgpt.flower.grid_transport import Admission, GridTransport
from fedgpt.flower.messages import (
    LEAST_REFUSED,
    MOST_REASON,
    MOST_REFUSED,
    info_content,
    question_content,
    read_job,
    refused_for,
    update_content,
)

JOB = Job("north", 0, 3, np.arange(1000, dtype=np.float32), Plan("run", 1, 0, 1, 1))


class Site:
    """A client that does what its policy allows, by a clock of its own."""

    def __init__(self, link, policy: Policy):
        self.policy, self.now = policy, datetime(2026, 11, 27, 12, 30)
        self.asked, self.says = 0, ""  # the number of questions; the error of its next jobs
        _, self._connection = link.node()
        self._stopped = threading.Event()
        self._thread = in_thread(self._answer_messages)

    def _answer_messages(self) -> None:
        while not self._stopped.wait(0.05):
            if (message := self._connection.receive()) is None:
                continue
            try:
                content = self._answer(message)
            except PolicyRefused as error:  # as the persistent node tells it
                content = Error(2, repr(error))
            if self.says and message.metadata.message_type == MessageType.TRAIN:
                content = Error(2, self.says)
            with suppress(UploadEnded):  # the server reads an error when it is announced
                send(self._connection, Message(content, reply_to=message))
        self._connection.deactivate()

    def _answer(self, message: Message) -> RecordDict:
        if message.metadata.message_type == MessageType.QUERY:
            self.asked += 1
            self.policy.refuse_run(RunOptions(), self.now)
            return info_content(ClientInfo("north", 10), "digest")
        job = read_job(message)
        self.policy.refuse_job(RunOptions(), job, self.now)
        return update_content(f'{{"task": {job.number}}}', job.params + 1)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.fixture
def site(link):
    made = []

    def make(policy: Policy) -> Site:
        made.append(Site(link, policy))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def transport(link):
    made = GridTransport(link.grid(), Admission(1, "digest", question_content("{}")))
    yield made
    made.close()


def reply(made: GridTransport) -> Reply:
    deadline = time.monotonic() + 60
    while not (found := made.receive(0.2)):
        assert time.monotonic() < deadline, "no reply"
    return found[0]


def test_a_site_is_asked_again_when_its_hours_begin(transport, site, caplog, monkeypatch):
    monkeypatch.setattr(messages, "LEAST_REFUSED", 2.0)
    one = site(Policy(hours="12:00-13:00"))
    assert [info.id for info in transport.clients(timeout=60)] == ["north"]
    one.now = datetime(2026, 11, 27, 11, 59, 58)
    transport.send([JOB])
    refused = reply(transport)
    why = "the site's policy has hours=12:00-13:00, and it is 11:59 there; it may be asked again in"
    assert refused.code == "policy" and f"{why} 2 s" in refused.error
    assert "client north refuses job 0: PolicyRefused" in caplog.text
    assert not transport.available("north")
    one.now = datetime(2026, 11, 27, 12, 0)
    # returns without a reply when the client may be asked again
    assert transport.receive(60.0) == [] and transport.available("north")
    transport.send([replace(JOB, number=1)])
    assert reply(transport).header == '{"task": 1}'


def test_a_site_that_was_away_is_asked_at_once(transport, site):
    """Its owner may have changed the policy."""
    one = site(Policy(most_steps=3))
    transport.clients(timeout=60)
    transport.send([replace(JOB, plan=replace(JOB.plan, local_steps=4))])
    assert "most_steps=3, and the server asks for a job of 4 steps" in reply(transport).error
    assert not transport.available("north")
    one.stop()
    deadline = time.monotonic() + 60
    while transport._resting:
        assert transport.receive(0.2) == [] and time.monotonic() < deadline


def test_a_run_waits_for_sites_that_refuse_it_and_says_who(transport, site, monkeypatch):
    monkeypatch.setattr(messages, "MOST_REFUSED", 0.5)
    one = site(Policy(runs=["another"]))
    with pytest.raises(StoppedEarly, match=r"runs=\[another\], and the server asks for name=run"):
        transport.clients(timeout=6.0)
    one.policy = Policy(runs=["run"])
    assert [info.id for info in transport.clients(timeout=60)] == ["north"]


def test_a_site_that_refuses_the_run_is_asked_again_when_it_says(transport, site, monkeypatch):
    """Not a minute later: each question brings the tokenizer."""
    monkeypatch.setattr(nodes, "ASK_AGAIN_SECONDS", 0.2)
    one = site(Policy(runs=["another"]))
    with pytest.raises(StoppedEarly, match="it may be asked again in 3600 s"):
        transport.clients(timeout=6.0)
    assert one.asked == 1


def test_a_refusal_of_many_lines_is_one_line_of_the_log(transport, site, caplog):
    one = site(Policy())
    transport.clients(timeout=60)
    one.says = "PolicyRefused\n2026-11-27 WARNING: all is lost\x1b[2J" + "x" * 10_000
    transport.send([JOB])
    assert reply(transport).code == "policy"
    (line,) = [r.getMessage() for r in caplog.records if "refuses job" in r.getMessage()]
    assert "PolicyRefused 2026-11-27 WARNING: all is lost [2Jxxx" in line
    assert line.isprintable() and len(line) < MOST_REASON + 100


@pytest.mark.parametrize(
    "told, seconds",
    [
        (repr(PolicyRefused("hours=1:00-2:00", "and it is 0:50 there", 600)), 600),
        (repr(PolicyRefused("a", "b", 10**9)), MOST_REFUSED),
        (repr(PolicyRefused("a", "b", 0)), LEAST_REFUSED),
        ("PolicyRefused: of another version", MOST_REFUSED),
        ("PolicyRefused asked again in -1 s", MOST_REFUSED),
        ("ValueError('no')", None),
    ],
)
def test_a_client_is_not_away_for_ever_or_asked_all_the_time_by_what_it_says(told, seconds):
    question = Message(RecordDict(), 1, MessageType.TRAIN)
    question.metadata.__dict__["_message_id"] = "1"
    assert refused_for(Message(Error(2, told), reply_to=question)) == seconds


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_run_that_goes_on_does_so_without_a_site_that_has_left_for_good(
    link, site, caplog, monkeypatch, goes_on
):
    monkeypatch.setattr(grid_transport, "FEWER_SECONDS", 7.0)
    members = (ClientInfo("gone", 10), ClientInfo("north", 10)) if goes_on else ()
    admission = Admission(2, "digest", question_content("{}"), members)
    site(Policy())
    made = GridTransport(link.grid(), admission)
    try:
        if goes_on:
            assert [info.id for info in made.clients(timeout=60)] == ["gone", "north"]
        else:
            with pytest.raises(StoppedEarly, match="1 of 2 clients connected"):
                made.clients(timeout=10.0)
    finally:
        made.close()
    assert "waiting for 2 clients: north connected" in caplog.text
    assert ("goes on without the others: it waited for 2 clients: north" in caplog.text) == goes_on
