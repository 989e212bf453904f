"""The transport over a scripted grid: retries, cancelled jobs, unreadable replies, waits."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from support.advice import advises

from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.core.messages import ClientInfo, Job, Plan
from fedgpt.flower import nodes
from fedgpt.flower.grid_transport import STOP_FILE, Admission, GridTransport
from fedgpt.flower.messages import (
    info_content,
    question_content,
    read_job,
    refusal_content,
    update_content,
)

DIED, RAISED = ErrorCode.CLIENT_APP_CRASHED, ErrorCode.CLIENT_APP_RAISED_EXCEPTION


class Grid:
    """Answers messages to a node with its error codes, one by one, then with a client's reply."""

    reason = "worker process 7 ended with signal SIGKILL"

    def __init__(self, codes: dict[int, list[int]]):
        self.codes, self.numbers = codes, itertools.count()
        self.pushed: list[Message] = []
        self.answers: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = message.metadata.__dict__["_message_id"] = f"message {next(self.numbers)}"
            ids.append(name)
            self.pushed.append(message)
            left = self.codes.get(message.metadata.dst_node_id, [])
            if left:
                error = Error(left.pop(0), self.reason)
                self.answers[name] = Message(
                    error, reply_to=make_message(message.metadata, RecordDict())
                )
            else:
                content = update_content('{"task": 0}', read_job(message).params + 1)
                self.answers[name] = Message(content, reply_to=message)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self.answers.pop(name) for name in ids if name in self.answers]


@pytest.fixture(autouse=True)
def inside_a_run(monkeypatch):
    for name in ("run_id", "task_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)


def transport(codes: dict[int, list[int]]) -> tuple[GridTransport, Grid]:
    grid = Grid(codes)
    known = {7: ClientInfo("a", 10), 8: ClientInfo("b", 10)}
    made = GridTransport(grid, Admission(2, "digest"), known, now=100.0)
    made.clients(timeout=1)
    return made, grid


def job(client: str) -> Job:
    return Job(client, 0, 3, np.arange(4, dtype=np.float32), Plan("run", 1, 0, 1, 1))


def test_the_job_of_a_process_that_died_is_retried(caplog):
    made, grid = transport({7: [DIED] * 2})
    made.send([job("a"), job("b")])
    replies = []
    while len(replies) < 2:
        replies += made.receive(1.0)
    assert sorted((reply.client, reply.error) for reply in replies) == [("a", ""), ("b", "")]
    asked = [read_job(message) for message in grid.pushed if message.metadata.dst_node_id == 7]
    assert [(j.number, j.version, j.params.tolist()) for j in asked] == [
        (0, 3, [0.0, 1.0, 2.0, 3.0])
    ] * 3
    retried = "client a job 0 is retried: worker process 7 ended with signal SIGKILL"
    assert caplog.text.count(retried) == 2


@pytest.mark.parametrize(
    "codes, tries", [([DIED] * 9, 3), ([RAISED], 1), ([ErrorCode.NODE_UNAVAILABLE], 1)]
)
def test_a_job_that_fails_in_all_attempts_or_raises_is_an_error(codes, tries):
    made, grid = transport({7: list(codes)})
    made.send([job("a")])
    replies = []
    while not replies:
        replies = made.receive(1.0)
    assert replies[0].error.startswith(f"code {codes[-1]}") and len(grid.pushed) == tries


def test_a_cancelled_job_is_not_retried():
    made, grid = transport({7: [DIED]})
    made.send([job("a")])
    made.abandon([("a", 0)])
    assert [reply.client for reply in made.receive(0.0)] == ["a"] and len(grid.pushed) == 1


def test_the_job_of_a_message_that_the_superlink_refuses_has_failed():
    made, grid = transport({})
    push = grid.push_messages
    grid.push_messages = lambda messages: [None, *push(list(messages)[1:])]
    made.send([job("a"), job("b")])
    assert [(r.client, r.error) for r in made.receive(1.0)] == [
        ("a", "the SuperLink refused the message"),
        ("b", ""),
    ]


def test_the_clock_continues_at_the_time_of_the_run():
    made, _ = transport({})
    assert 100.0 <= made.now() <= made.now() < 110.0


class Broken(Grid):
    """Flower raises an exception when it reads a reply from one of these nodes."""

    def __init__(self, nodes: set[int], raised: Exception):
        super().__init__({})
        self.nodes, self.raised = nodes, raised

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        found = super().pull_messages(ids)  # like a SuperLink, it gives each reply only once
        if any(message.metadata.src_node_id in self.nodes for message in found):
            raise self.raised
        return found


@pytest.mark.parametrize(
    "raised", [KeyError("x"), json.JSONDecodeError("", "", 0), MemoryError()], ids=repr
)
def test_a_reply_that_flower_cannot_read_is_an_error_of_its_client_only(
    raised,
):
    made = GridTransport(
        Broken({7}, raised),
        Admission(2, "digest"),
        {7: ClientInfo("a", 10), 8: ClientInfo("b", 10)},
    )
    made.clients(timeout=1)
    made.send([job("a"), job("b")])
    replies = {}
    while len(replies) < 2:
        replies |= {reply.client: reply for reply in made.receive(1.0)}
    assert replies["a"].code == "bad_encoding" and type(raised).__name__ in replies["a"].error
    assert replies["b"].error == "" and replies["b"].payload.tolist() == [1.0, 2.0, 3.0, 4.0]
    made.send([job("a")])  # the transport can still be used


class Asked(Grid):
    """Nodes whose answers to the first query are given."""

    def __init__(self, answers: dict[int, RecordDict]):
        super().__init__({})
        self.contents, self.polls = answers, itertools.count()

    def get_node_ids(self) -> list[int]:
        self.poll()
        return list(self.contents)

    def poll(self) -> None:
        """Fail a test whose wait does not end; as no error of a node, which the server handles."""
        if next(self.polls) == 100:  # those of five seconds
            pytest.fail("the wait has no end")

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = message.metadata.__dict__["_message_id"] = f"message {next(self.numbers)}"
            ids.append(name)
            self.answers[name] = Message(
                self.contents[message.metadata.dst_node_id], reply_to=message
            )
        return ids


def test_nodes_answer_which_client_they_are():
    made = GridTransport(
        Asked({n: info_content(ClientInfo(f"c{n}", n), "digest") for n in (7, 8)}),
        Admission(2, "digest"),
    )
    assert made.clients(timeout=1) == [ClientInfo("c7", 7), ClientInfo("c8", 8)]


def test_a_client_with_other_data_is_refused_without_a_digest():
    """A digest in the server's output would confirm a guess of the client's text."""
    asked = Asked({7: info_content(ClientInfo("ann", 1), "0123456789abcdef")})
    with pytest.raises(FedGPTError, match="client 'ann' prepared other data than the server;") as e:
        GridTransport(asked, Admission(1, "fedcba9876543210")).clients(timeout=1)
    assert "0123" not in str(e.value) and "fedc" not in str(e.value)


@pytest.mark.parametrize(
    "answer",
    [
        RecordDict(),
        RecordDict(
            {"who": ConfigRecord({"id": "a", "digest": "digest"}), "size": MetricRecord({})}
        ),
        RecordDict(
            {
                "who": ConfigRecord({"id": "a", "digest": "digest"}),
                "size": MetricRecord({"tokens": 0.5}),
            }
        ),
        info_content(ClientInfo("a", 0), "digest"),
        info_content(ClientInfo("a", -5), "digest"),
        refusal_content([]),
    ],
    ids=["empty", "no size", "half a token", "no token", "negative", "no problem"],
)
def test_the_error_for_an_unreadable_answer_names_the_node(answer):
    made = GridTransport(Asked({8: answer}), Admission(1, "digest"))
    with pytest.raises(
        FedGPTError, match=r"node 8 did not report its client: its answer cannot be read"
    ):
        made.clients(timeout=1)


def test_a_client_that_cannot_use_the_options_says_why():
    refusal = refusal_content(["corpus._target_=mine.Poems: cannot import mine", "x" * 1000])
    made = GridTransport(Asked({8: refusal}), Admission(1, "digest"))
    with pytest.raises(ConfigError) as caught:
        made.clients(timeout=1)
    first, second = caught.value.problems
    assert first == "node 8: corpus._target_=mine.Poems: cannot import mine"
    assert len(second) < 600, "a client chooses the text"


def of_sites(expected: int, planned: bool = False) -> Admission:
    question = question_content("{}")
    return Admission(expected, "digest", question, late=True, planned=planned)


@pytest.mark.parametrize(
    "wrong, why",
    [
        (refusal_content(["model.n_layer=9: no"]), "model.n_layer=9: no"),
        (info_content(ClientInfo("a", 5), "other"), "uses another tokenizer than the server sent"),
        (RecordDict(), "its answer cannot be read"),
    ],
    ids=["refused options", "another tokenizer", "no answer"],
)
def test_a_wrong_site_does_not_end_the_wait_for_others(wrong, why):
    grid = Asked({7: wrong})
    made = GridTransport(grid, of_sites(1))
    with pytest.raises(StoppedEarly, match=f"0 of 1 clients connected .* left out: .*{why}"):
        made.clients(timeout=0.2)
    grid.contents[8] = info_content(ClientInfo("b", 5), "digest")
    assert made.clients(timeout=1) == [ClientInfo("b", 5)]


def test_two_sites_of_one_name_are_told_apart_by_their_kits(monkeypatch):
    monkeypatch.setattr(nodes, "ASK_AGAIN_SECONDS", 0.1)
    grid = Asked({n: info_content(ClientInfo("north", n), "digest") for n in (7, 8)})
    made = GridTransport(grid, of_sites(2))
    with pytest.raises(StoppedEarly) as caught:
        made.clients(timeout=0.2)
    assert "node 8 says that it is client 'north', as node 7 does" in str(caught.value)
    assert "partition-id" not in str(caught.value)
    advises(
        caught.value,
        "use a site's kit for one client at a time, and give every site a name of its own",
    )
    grid.contents[8] = info_content(ClientInfo("south", 8), "digest")
    assert [info.id for info in made.clients(timeout=1)] == ["north", "south"]


def test_a_late_site_has_an_amount_of_text_for_which_the_run_was_planned(caplog):
    sizes = {"small": 256, "large": 1024, "less": 128, "more": 2048, "between": 512}
    answers = {
        node: info_content(ClientInfo(name, size), "digest")
        for node, (name, size) in enumerate(sizes.items())
    }
    grid = Asked({node: answers[node] for node in (0, 1)})
    made = GridTransport(grid, of_sites(2, planned=True))
    assert len(made.clients(timeout=1)) == 2
    grid.contents.update(answers)
    made.receive(0.5)
    assert [info.id for info in made.newcomers()] == ["between"]
    assert "client 'less' has less text than any client at the start" in caplog.text
    assert "client 'more' has more text than any client at the start" in caplog.text


def test_the_server_does_not_read_its_text_again_for_what_a_site_reports(monkeypatch):
    def check_text():
        pytest.fail("its text is read")

    grid = Asked({7: info_content(ClientInfo("a", 5), "digest")})
    made = GridTransport(grid, of_sites(1), check_text=check_text)
    made.clients(timeout=1)
    monkeypatch.setattr(grid, "push_messages", lambda messages: Grid.push_messages(grid, messages))
    grid.codes[7] = [RAISED]
    monkeypatch.setattr(grid, "reason", "TextChanged('it did not')")
    made.send([job("a")])
    assert [reply.code for reply in made.receive(1.0)] == ["client_error"]


def test_a_client_that_comes_and_goes_is_not_waited_for_without_a_bound(monkeypatch):
    here = {7: info_content(ClientInfo("a", 5), "digest")}
    grid, seconds = Asked(here), itertools.count(step=60)
    made = GridTransport(grid, Admission(1, "digest"))
    made.clients(timeout=1)
    clock = next(seconds)
    monkeypatch.setattr(made, "now", lambda: clock)

    def push(messages: list[Message]) -> list[str]:
        asked = messages[0].metadata.message_type == MessageType.QUERY
        return (Asked if asked else Grid).push_messages(grid, messages)

    monkeypatch.setattr(grid, "push_messages", push)
    grid.codes[7] = [ErrorCode.NODE_UNAVAILABLE] * 9
    made.send([job("a")])
    found = []
    while not found and clock < 600:
        grid.contents = {}
        found += made.receive(0.0)
        clock = next(seconds)
        found += made.receive(0.0)
        grid.contents = here
        found += made.receive(0.0)  # it is asked again who it is
        found += made.receive(0.0)
    assert [reply.code for reply in found] == ["offline"]
    assert clock == 240 and len(grid.pushed) == 4, "three times it came back in 180 seconds"


def test_the_job_of_a_client_that_is_back_and_busy_waits_for_its_answer(monkeypatch):
    """It answers who it is after the job that it was doing when its link was cut."""
    here = {7: info_content(ClientInfo("a", 5), "digest")}
    grid = Asked(here)
    made = GridTransport(grid, Admission(1, "digest"))
    made.clients(timeout=1)
    grid.codes[7] = [ErrorCode.NODE_UNAVAILABLE]

    def push(messages: list[Message]) -> list[str]:
        asked = messages[0].metadata.message_type == MessageType.QUERY
        return ["unanswered"] if asked else Grid.push_messages(grid, messages)

    monkeypatch.setattr(grid, "push_messages", push)
    made.send([job("a")])
    grid.contents = {}
    assert made.receive(0.0) == [] and made._parked
    grid.contents = here  # the link is back, and the answer takes long
    clock = made.now()
    for later in (10, 200, 2000):
        monkeypatch.setattr(made, "now", lambda: clock + later)  # noqa: B023  # read at once
        assert made.receive(0.0) == [] and made._parked
    grid.contents = {}
    assert [reply.code for reply in made.receive(0.0)] == ["offline"]


def test_the_error_for_missing_clients_says_how_many_connected():
    made = GridTransport(
        Asked({7: info_content(ClientInfo("a", 1), "digest")}), Admission(3, "digest")
    )
    with pytest.raises(StoppedEarly, match=r"1 of 3 clients connected within 0 s"):
        made.clients(timeout=0.2)


def test_waiting_for_the_answers_of_nodes_has_a_time_limit():
    class Silent(Asked):
        def pull_messages(self, ids: Iterable[str]) -> list[Message]:
            self.poll()
            return []

    made = GridTransport(Silent({7: RecordDict()}), Admission(1, "digest"))
    with pytest.raises(
        StoppedEarly, match=r"0 of 1 clients connected within 0 s; 1 node did not say"
    ):
        made.clients(timeout=0.2)


def test_the_stop_file_ends_every_wait(tmp_path, monkeypatch):
    """A launcher stops a server this way if the server's process or thread gets no signal."""
    stop = tmp_path / "stop"
    monkeypatch.setenv(STOP_FILE, str(stop))
    known = {7: ClientInfo("a", 10)}
    made = GridTransport(Asked({}), Admission(1, "digest"))
    working = GridTransport(Grid({}), Admission(1, "digest"), known)
    assert working.receive(0.1) == []
    stop.touch()
    for wait in (lambda: made.clients(timeout=60), lambda: working.receive(60.0)):
        with pytest.raises(KeyboardInterrupt):
            wait()


def test_jumps_of_the_wall_clock_move_no_deadline(monkeypatch):
    """Each reading jumps by an hour; waits keep their length, and the run's clock is monotonic."""
    real, jumps = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * next(jumps))
    made, _ = transport({})
    before, began = made.now(), time.monotonic()
    for _ in range(3):
        assert made.receive(0.2) == []
    took = time.monotonic() - began
    assert 0.6 <= took < 30 and made.now() - before == pytest.approx(took, abs=0.5)
    with pytest.raises(StoppedEarly, match="connected within"):
        GridTransport(Asked({}), Admission(1, "digest")).clients(timeout=0.2)
