"""Requests wait for what they ask for: a message, an object, a reply."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from support.link import PROTOBUF, Site, call

from fedgpt.flower.deploy import inner, waiting
from fedgpt.flower.deploy.guard import NOT_YET, Guard
from fedgpt.flower.deploy.limits import Record
from fedgpt.flower.deploy.waiting import REPLY, Bell

WAIT = 30.0  # seconds; every request that waits so long has missed its ring
LOOK = 0.5  # seconds in which a request that does not wait has its answer


@pytest.fixture
def guard(fleet, monkeypatch) -> Guard:
    monkeypatch.setattr(waiting, "WAIT_SECONDS", WAIT)
    one = Guard(fleet.app, lambda: fleet.approved, Record(lambda line: None), 64, fleet.bell)
    one._nodes = fleet.guard._nodes  # both know what a node may fetch
    return one


def asking(guard: Guard, what: str, request, site: Site, stays: bool = True) -> asyncio.Task:
    """A request of a node, under way."""
    body = request.SerializeToString()
    own = {"content-type": PROTOBUF.decode(), "content-length": str(len(body)), **site.headers()}
    raw = [(name.encode(), value.encode()) for name, value in own.items()]
    return asyncio.create_task(call(guard, f"/v1/fleet/{what}", raw, [body], stays=stays))


async def waits(task: asyncio.Task) -> bool:
    return not (await asyncio.wait([task], timeout=LOOK))[0]


async def body(task: asyncio.Task) -> bytes:
    answer = await asyncio.wait_for(task, WAIT / 2)
    assert answer.status == 200
    return answer.body


def test_a_node_that_asks_for_a_message_gets_it_when_it_is_there(fleet, guard):
    async def scenario() -> None:
        north, south = (
            asking(guard, "pull-messages", PullMessagesRequest(node=fleet.of(site)), site)
            for site in fleet.sites
        )
        assert await waits(north) and await waits(south)
        job = await asyncio.to_thread(fleet.job, fleet.sites[0], np.arange(3))
        found = PullMessagesResponse.FromString(await body(north))
        assert found.messages_list[0].metadata.message_id == job.object_id
        assert await waits(south), "a message wakes its own node alone"
        await asyncio.to_thread(fleet.job, fleet.sites[1], np.arange(3))
        assert PullMessagesResponse.FromString(await body(south)).messages_list

    asyncio.run(scenario())


def test_an_object_that_the_server_still_sends_is_waited_for(fleet, guard):
    site = fleet.sites[0]
    job, send = fleet.announced(site, np.arange(4))
    assert PullMessagesResponse.FromString(fleet.pull(site).body).messages_list
    wanted = PullObjectRequest(
        node=fleet.of(site), run_id=fleet.run_id, object_id=job.metadata.message_id
    )

    async def scenario() -> None:
        asked = asking(guard, "pull-object", wanted, site)
        assert await waits(asked)
        await asyncio.to_thread(send)
        found = PullObjectResponse.FromString(await body(asked))
        assert found.object_available and found.object_content == job.deflate()

    asyncio.run(scenario())


def test_a_message_is_not_handed_to_a_node_that_has_gone_away_while_it_waited(fleet, guard):
    site = fleet.sites[0]

    async def scenario() -> None:
        wanted = PullMessagesRequest(node=fleet.of(site))
        assert await body(asking(guard, "pull-messages", wanted, site, stays=False)) == b""
        await asyncio.to_thread(fleet.job, site, np.arange(5))

    asyncio.run(scenario())
    assert PullMessagesResponse.FromString(fleet.pull(site).body).messages_list


@pytest.mark.parametrize("path, content", [(inner.REPLIES, b""), (inner.REPLIES, b"a reply")])
def test_a_question_of_the_server_waits_for_the_next_reply(path, content, monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_SECONDS", WAIT)
    bell, asked = Bell(), []

    async def app(scope, receive, send) -> None:
        """It has a reply the second time, or at once."""
        asked.append((await receive())["body"])
        answer = b"a reply" if len(asked) > 1 else content
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})

    async def scenario() -> None:
        task = asyncio.create_task(
            call(inner.Only(app, inner.RUNTIME, bell), path, [], [b"ids"], stays=True)
        )
        if not content:
            assert await waits(task)
            bell.ring("another key")
            assert await waits(task)
            await asyncio.to_thread(bell.ring, REPLY)
        assert await body(task) == b"a reply"

    asyncio.run(scenario())
    assert asked == [b"ids"] * (1 if content else 2)
    assert not bell._waiting


def test_the_answer_for_an_object_that_is_not_there_yet_is_flowers():
    assert PullObjectResponse.FromString(NOT_YET).object_found
    assert not PullObjectResponse.FromString(NOT_YET).object_available


def test_who_waits_in_vain_gets_the_first_answer(fleet, guard, monkeypatch):
    monkeypatch.setattr(waiting, "WAIT_SECONDS", 0.2)

    async def scenario() -> None:
        site = fleet.sites[1]
        wanted = PullMessagesRequest(node=fleet.of(site))
        assert await body(asking(guard, "pull-messages", wanted, site)) == b""

    asyncio.run(scenario())
