"""Answers that the network loses on their way to a node: what it has asked for is done once."""

from __future__ import annotations

import asyncio

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, RecordDict
from flwr.proto.fleet_pb2 import (
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.state.schema.linkstate_models import MessageRes
from flwr.supercore.state.schema.linkstate_models import Node as NodeRow
from sqlalchemy import select, update
from support.link import PROTOBUF, Fleet, Site, call

from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.guard import Guard
from fedgpt.flower.deploy.limits import Record


def handed(fleet: Fleet, site: Site) -> list[int]:
    """The run of each message in the answer to a question of a node."""
    found = PullMessagesResponse.FromString(fleet.pull(site).body)
    return [message.metadata.run_id for message in found.messages_list]


class LosesOneConfirmation:
    """Flower's client, through the guard; the first answer to a confirmation is lost."""

    def __init__(self, fleet: Fleet, site: Site):
        self.fleet, self.site, self.confirmed, self.pulled = fleet, site, 0, 0

    def _ask(self, what: str, request, kind):
        answer = self.fleet.ask(what, request, self.site)
        response = httpx.Response(answer.status, request=httpx.Request("POST", "http://link"))
        response.raise_for_status()
        return kind.FromString(answer.body)

    def PullMessages(self, request):  # Flower's name
        return self._ask("pull-messages", request, PullMessagesResponse)

    def PullObject(self, request):
        self.pulled += 1
        return self._ask("pull-object", request, PullObjectResponse)

    def ConfirmMessageReceived(self, request):
        answer = self._ask("confirm-message-received", request, ConfirmMessageReceivedResponse)
        self.confirmed += 1
        if self.confirmed == 1:
            raise httpx.ReadError("the network lost the answer")
        return answer


def test_a_message_is_read_once_though_the_answer_to_its_confirmation_is_lost(fleet):
    site = fleet.sites[0]
    client = LosesOneConfirmation(fleet, site)
    connection = FleetConnection("127.0.0.1:1", site.private, None)
    connection._client, connection._node = client, Node(node_id=fleet.node(site))  # type: ignore
    job = fleet.job(site, np.arange(10))
    with pytest.raises(httpx.ReadError):
        connection.receive()
    pulled = client.pulled
    message = connection.receive()
    assert message is not None and message.metadata.message_id == job.metadata.message_id
    assert (client.pulled, client.confirmed) == (pulled, 2)
    assert connection.receive() is None


def test_a_message_that_was_handed_out_while_another_question_waited_is_not_lost(fleet):
    """The node has given up its first question, whose answer comes late."""
    site, app, asked = fleet.sites[0], fleet.guard._app, []

    async def slow(scope, receive, send) -> None:
        first = not asked
        asked.append(scope["path"])

        async def later(event) -> None:
            if first and event["type"] == "http.response.start":
                await asyncio.sleep(0.5)
            await send(event)

        await app(scope, receive, later)

    def question() -> asyncio.Task:
        body = PullMessagesRequest(node=fleet.of(site)).SerializeToString()
        own = {"content-type": PROTOBUF.decode(), "content-length": str(len(body))}
        raw = [(name.encode(), value.encode()) for name, value in (own | site.headers()).items()]
        return asyncio.create_task(call(guard, "/v1/fleet/pull-messages", raw, [body], stays=True))

    async def scenario() -> None:
        await asyncio.to_thread(fleet.job, site, np.arange(7))
        lost = question()
        await asyncio.sleep(0.2)
        again = question()
        await lost
        assert PullMessagesResponse.FromString((await again).body).messages_list

    guard = Guard(slow, lambda: fleet.approved, Record(lambda line: None), 64, fleet.bell)
    guard._nodes = fleet.guard._nodes  # both know what a node has got
    asyncio.run(scenario())
    assert handed(fleet, site) == [fleet.run_id], "until the node shows that it has it"


def test_an_object_whose_answer_was_lost_is_stored_when_it_is_sent_again(fleet):
    site = fleet.sites[0]
    job = fleet.job(site, np.arange(5))
    fleet.pull(site)
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    reply = fleet.reply(site, job, RecordDict({"arrays": ArrayRecord([values])}))
    answer = fleet.ask("push-messages", fleet.announce(site, reply), site)
    session = PushMessagesResponse.FromString(answer.body)
    objects = get_all_nested_objects(reply)
    for object_id in [*session.objects_to_push, session.objects_to_push[0]]:
        sent = fleet.upload(site, session.session_id, object_id, objects[object_id].deflate())
        assert PushObjectResponse.FromString(fleet.ask("push-object", sent, site).body).stored


def test_a_node_that_drops_a_message_of_a_run_that_has_ended_gets_the_next_one(fleet):
    """A stock node asks for the run, before it asks for an object."""
    site, old = fleet.sites[0], fleet.run_id
    fleet.job(site, np.arange(3))
    assert handed(fleet, site) == [old]
    fleet.state.stop_run(old)
    fleet.run_id, fleet.task = fleet._run()
    fleet.job(site, np.arange(4))
    assert fleet.ask("get-run", GetRunRequest(node=fleet.of(site), run_id=old), site).status == 403
    assert handed(fleet, site) == [fleet.run_id]


def test_a_job_that_its_node_never_confirmed_leaves_no_objects(fleet, tmp_path):
    site = fleet.sites[0]
    fleet.pull(site)
    before = len(fleet.state.object_store)
    job = fleet.job(site, np.random.default_rng(0).normal(size=50_000))
    assert len(fleet.state.object_store) > before
    fleet.state.delete_messages({job.metadata.message_id})  # as when its node has gone away
    assert len(fleet.state.object_store) == before
    assert not list(tmp_path.glob("link.objects/*"))


@pytest.mark.parametrize("killed", [True, False])
def test_an_upload_ends_with_its_client_also_after_the_server_has_heard_of_it(fleet, killed):
    state, site = fleet.state, fleet.sites[0]
    job = fleet.job(site, np.arange(5))
    fleet.pull(site)
    reply = fleet.reply(site, job, RecordDict({"arrays": ArrayRecord([np.arange(50.0)])}))
    assert fleet.ask("push-messages", fleet.announce(site, reply), site).status == 200
    found = state.get_message_res({job.metadata.message_id}, fleet.run_id)
    assert [one.has_error() for one in found] == [False]
    # as Flower does with what it has handed out
    state.delete_messages({job.metadata.message_id})
    kept = get_all_nested_objects(reply)
    assert all(state.get_object(fleet.run_id, key) is not None for key in kept)
    if killed:
        with state.session() as rows:
            rows.execute(update(NodeRow).values(online_until=0.0))
        assert fleet.activate(site).status == 200
    else:
        stopped = DeactivateNodeRequest(node_id=fleet.node(site))
        assert fleet.ask("deactivate-node", stopped, site).status == 200
    assert [state.get_object(fleet.run_id, key) for key in kept] == [None] * len(kept)


@pytest.mark.parametrize("killed", [True, False])
def test_an_upload_ends_with_its_client_and_a_complete_reply_stays(fleet, killed):
    """The server of the run need not wait until Flower's time for an upload is over."""
    state, replies = fleet.state, []
    for site, parts in zip(fleet.sites, (1, None), strict=True):
        job = fleet.job(site, np.arange(5))
        fleet.pull(site)
        values = np.random.default_rng(len(replies)).normal(size=50)
        reply = fleet.reply(site, job, RecordDict({"arrays": ArrayRecord([values])}))
        answer = fleet.ask("push-messages", fleet.announce(site, reply), site)
        session = PushMessagesResponse.FromString(answer.body)
        for key in session.objects_to_push[:parts]:
            content = get_all_nested_objects(reply)[key].deflate()
            fleet.ask("push-object", fleet.upload(site, session.session_id, key, content), site)
        replies.append(reply)
    with state.session() as rows:
        if killed:  # it was not heard of for a minute, and starts again
            rows.execute(update(NodeRow).values(online_until=0.0))
    for site in fleet.sites:
        stopped = DeactivateNodeRequest(node_id=fleet.node(site))
        answer = fleet.activate(site) if killed else fleet.ask("deactivate-node", stopped, site)
        assert answer.status == 200
    cut, whole = replies
    assert state.get_object(fleet.run_id, cut.object_id) is None
    assert all(state.get_object(fleet.run_id, key) for key in get_all_nested_objects(whole))
    with state.session() as rows:
        assert list(rows.scalars(select(MessageRes.message_id))) == [whole.object_id]
    jobs = {reply.metadata.reply_to_message_id for reply in replies}
    found = state.get_message_res(jobs, fleet.run_id)
    # of the other one Flower says that its node has gone, or nothing if it has come again
    assert [one.metadata.message_id for one in found if not one.has_error()] == [whole.object_id]
    assert fleet.activate(fleet.sites[1]).status == (412 if killed else 200)
