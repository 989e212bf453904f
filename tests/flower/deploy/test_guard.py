"""The guard around the real SuperLink app: what strangers, and nodes that misbehave, may not do."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from base64 import b64encode
from datetime import UTC, datetime, timedelta
from itertools import repeat

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.state.schema.corestate_models import ObjectPushSession
from sqlalchemy import select
from support.advice import advises
from support.link import PROTOBUF, Fleet, Site, call

from fedgpt.flower.deploy import exchange, guard, limits

ARRAY = np.arange(10, dtype=np.float32)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("server"))


@pytest.fixture
def fleet(shared, monkeypatch) -> Fleet:
    """The real app with a fresh guard; both sites are active."""
    monkeypatch.setattr(shared, "lines", [])
    fresh = guard.Guard(
        shared.app,
        lambda: shared.approved,
        limits.Record(shared.lines.append),
        64,
    )
    monkeypatch.setattr(shared, "guard", fresh)
    monkeypatch.setattr(shared, "approved", dict(shared.approved))
    for site in shared.sites:
        shared.ask("deactivate-node", DeactivateNodeRequest(node_id=shared.node(site)), site)
        assert shared.activate(site).status == 200
    shared.lines.clear()
    return shared


def handed(fleet: Fleet, site: Site, array: np.ndarray = ARRAY):
    """A job that the site has been handed."""
    job = fleet.job(site, array)
    pulled = PullMessagesResponse.FromString(fleet.pull(site).body)
    assert [m.metadata.message_id for m in pulled.messages_list] == [job.metadata.message_id]
    return job


def pull_object(fleet: Fleet, site: Site, key: str):
    request = PullObjectRequest(node=fleet.of(site), run_id=fleet.run_id, object_id=key)
    return fleet.ask("pull-object", request, site)


def confirm(fleet: Fleet, site: Site, key: str):
    request = ConfirmMessageReceivedRequest(
        node=fleet.of(site), run_id=fleet.run_id, message_object_id=key
    )
    return fleet.ask("confirm-message-received", request, site)


def content(array: np.ndarray) -> RecordDict:
    return RecordDict({"update": ArrayRecord([array])})


def send_reply(fleet: Fleet, site: Site, reply) -> list[int]:
    """Announce a reply and upload its objects as a node does; the statuses."""
    announced = fleet.ask("push-messages", fleet.announce(site, reply), site)
    if announced.status != 200:
        return [announced.status]
    response, objects = (
        PushMessagesResponse.FromString(announced.body),
        get_all_nested_objects(reply),
    )
    return [200] + [
        fleet.ask(
            "push-object",
            fleet.upload(site, response.session_id, key, objects[key].deflate()),
            site,
        ).status
        for key in response.objects_to_push
    ]


# an honest node

CHUNK = 1024


@pytest.fixture
def small_chunks(monkeypatch) -> None:
    """Chunks of 1 KiB in place of 5 MiB: only their number counts."""
    monkeypatch.setattr("flwr.app.message.array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)


def test_a_node_activates_beats_pulls_confirms_and_pushes(fleet):
    north, _ = fleet.sites
    beat = SendNodeHeartbeatRequest(node=fleet.of(north), heartbeat_interval=30)
    assert fleet.ask("send-node-heartbeat", beat, north).status == 200
    job = handed(fleet, north)
    for key in get_all_nested_objects(job):
        assert pull_object(fleet, north, key).status == 200
    assert confirm(fleet, north, job.metadata.message_id).status == 200
    assert set(send_reply(fleet, north, fleet.reply(north, job, content(ARRAY + 1)))) == {200}
    (reply,) = fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id)
    assert reply.metadata.src_node_id == fleet.node(north) and fleet.lines == []


def test_a_node_may_repeat_what_had_no_answer(fleet, small_chunks):
    north, _ = fleet.sites
    job = handed(fleet, north)
    assert [confirm(fleet, north, job.metadata.message_id).status for _ in range(3)] == [200] * 3
    array = Array(np.zeros(10, np.float32))
    array.data = bytes(40 * CHUNK)  # its equal chunks count once, however often it comes
    reply = fleet.reply(north, job, RecordDict({"a": ArrayRecord({"w": array})}))
    announced = fleet.ask("push-messages", fleet.announce(north, reply), north)
    response = PushMessagesResponse.FromString(announced.body)
    objects = get_all_nested_objects(reply)
    for key in response.objects_to_push:
        request = fleet.upload(north, response.session_id, key, objects[key].deflate())
        assert [fleet.ask("push-object", request, north).status for _ in range(3)] == [200] * 3


def test_a_message_whose_answer_was_lost_is_handed_out_again(fleet):
    """Flower hands it out once; the node, which never saw it, asks for the next message."""
    north, south = fleet.sites
    job = handed(fleet, north)
    later = fleet.job(north, ARRAY)
    again = PullMessagesResponse.FromString(fleet.pull(north).body)
    assert [m.metadata.message_id for m in again.messages_list] == [job.metadata.message_id]
    assert [tree.object_id for tree in again.message_object_trees] == [job.metadata.message_id]
    assert not PullMessagesResponse.FromString(fleet.pull(south).body).messages_list
    assert pull_object(fleet, north, job.object_id).status == 200
    following = PullMessagesResponse.FromString(fleet.pull(north).body)
    assert [m.metadata.message_id for m in following.messages_list] == [later.metadata.message_id]
    # one that starts again has lost it for another reason, and the server knows
    fleet.ask("deactivate-node", DeactivateNodeRequest(node_id=fleet.node(north)), north)
    assert fleet.activate(north).status == 200
    assert not PullMessagesResponse.FromString(fleet.pull(north).body).messages_list


def test_an_error_reply_is_accepted(fleet):
    north, _ = fleet.sites
    reply = fleet.reply(north, handed(fleet, north), Error(2, "it failed"))
    assert send_reply(fleet, north, reply)[0] == 200


# paths


def routes(app) -> set[tuple[str, str]]:
    """(method, path) of every route, also of those included from routers."""
    schema = {
        (method.upper(), path)
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    }
    return schema | {("GET", path) for path in ("/docs", "/openapi.json", "/docs/oauth2-redirect")}


def test_the_ten_paths_are_those_of_flower_and_every_other_route_is_refused(fleet):
    north, _ = fleet.sites
    found = routes(fleet.app)
    ours = {("POST", guard.FLEET + what) for what in guard.PATHS}
    assert ours < found and len(ours) == 10 and len(found) > 60
    headers = [(b"content-type", PROTOBUF), (b"content-length", b"0")]
    headers += [(name.encode(), value.encode()) for name, value in north.headers().items()]
    for method, path in found - ours:
        answer = fleet.send(path, headers, [b""], method=method)
        assert answer.status == (412 if path == guard.REGISTER else 403), (method, path)
        assert answer.read == 0 and answer.reason == "path"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/./pull-messages",
        "/v1/fleet//pull-messages",
        "//v1/fleet/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/Pull-Messages",
        "/V1/FLEET/pull-messages",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/pull-messages\x00",
        "/v1/fleet/pull-messages ",
        "/v1/fleet/pull-mess\u0430ges",
        "/v1/fleet/pull-messages/../../control/start-run",
        "http://host/v1/fleet/pull-messages",
        "/v1/fleet/",
        "/v1/fleet",
        "pull-messages",
        "*",
        "",
        "/",
    ],
)
def test_another_spelling_of_a_path_is_refused(fleet, path):
    assert fleet.send(path, [], [b""]).status == 403


@pytest.mark.parametrize(
    "scope",
    [
        {"raw_path": b"/v1/fleet/pull%2Dmessages"},
        {"raw_path": b"/v1/fleet/%70ull-messages"},
        {"raw_path": b"/v1/%66leet/pull-messages"},
        {"query_string": b"x=1"},
        {"root_path": "/v1"},
        {"method": "GET"},
        {"method": "PUT"},
        {"method": "post"},
        {"method": "OPTIONS"},
    ],
)
def test_another_spelling_of_a_request_is_refused(fleet, scope):
    north, _ = fleet.sites
    answer = fleet.ask("pull-messages", PullMessagesRequest(node=fleet.of(north)), north, **scope)
    assert answer.status == 403 and answer.headers["connection"] == "close"


def test_a_websocket_gets_no_answer(fleet):
    with pytest.raises(ValueError, match="not enough values"):
        fleet.send("/v1/fleet/pull-messages", [], [b""], type="websocket")


# headers and bodies


@pytest.mark.parametrize(
    "headers, status, reason",
    [
        ({"content-length": str(9 << 20)}, 413, "too_large"),
        ({"content-length": "9" * 19}, 413, "too_large"),
        ({"content-length": "9" * 30}, 400, "length"),
        ({"content-length": "-1"}, 400, "length"),
        ({"content-length": "+5"}, 400, "length"),
        ({"content-length": "1e3"}, 400, "length"),
        ({"content-length": "\u0661"}, 400, "length"),
        ({"content-length": "5, 5"}, 400, "length"),
        ({"content-length": ""}, 400, "length"),
        ({"transfer-encoding": "chunked"}, 400, "length"),  # with a length
        ({"transfer-encoding": "gzip, chunked", "content-length": ""}, 400, "length"),
        ({"transfer-encoding": "Chunked ", "content-length": ""}, 400, "length"),
        ({"content-type": "application/json"}, 415, "content_type"),
        ({"content-type": ""}, 415, "content_type"),
        ({"content-type": "application/protobuf; x=1"}, 415, "content_type"),
        ({"content-encoding": "gzip"}, 415, "content_type"),
    ],
)
def test_odd_headers_are_refused_before_anybody_is_known_or_read(fleet, headers, status, reason):
    for site in (None, fleet.sites[0]):
        answer = fleet.ask("push-object", b"", site, headers=headers)
        assert (answer.status, answer.reason, answer.read) == (status, reason, 0)
        assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("name", ["content-length", "Content-Type", "FLWR-PUBLIC-KEY", "host"])
def test_a_header_that_stands_twice_is_refused(fleet, name):
    north, _ = fleet.sites
    own = {"content-type": PROTOBUF.decode(), "content-length": "0", "host": "a", **north.headers()}
    raw = [(key.encode(), value.encode()) for key, value in own.items()]
    answer = fleet.send("/v1/fleet/pull-messages", [*raw, (name.encode(), b"x")], [b""])
    assert (answer.status, answer.reason) == (400, "header")


@pytest.mark.parametrize("what", guard.PATHS)
def test_a_chunked_body_is_cut_at_the_most_of_its_path(fleet, what):
    north, _ = fleet.sites
    headers = {"transfer-encoding": "chunked", "content-type": PROTOBUF.decode(), **north.headers()}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    piece = b"\x00" * (1 << 16)
    answer = fleet.send(guard.FLEET + what, raw, repeat(piece, 1 << 14))
    assert (answer.status, answer.reason) == (413, "too_large")
    most = guard.PATHS[what] + (guard.ENTRY * 64 if what == "push-messages" else 0)
    assert answer.read <= most + len(piece)
    assert answer.headers["connection"] == "close" and answer.headers["content-type"].endswith(
        "json"
    )


@pytest.mark.parametrize("length", [300 << 20, 1 << 30, None])
def test_nothing_of_a_large_body_is_read_without_credentials(fleet, length):
    raw = [(b"content-type", PROTOBUF)]
    raw.append(
        (b"transfer-encoding", b"chunked")
        if length is None
        else (b"content-length", b"%d" % length)
    )
    answer = fleet.send("/v1/fleet/push-object", raw, repeat(b"\x00" * (1 << 16), 1 << 14))
    assert answer.status == (401 if length is None else 413) and answer.read == 0


def test_garbage_is_refused(fleet):
    north, _ = fleet.sites
    for what in guard.PATHS:
        answer = fleet.ask(what, b"\xff\xff\xff garbage", north)
        assert (answer.status, answer.reason) == (400, "malformed")


def test_flower_sees_only_headers_that_it_needs(fleet, monkeypatch):
    seen = {}

    async def app(scope, receive, send):
        seen.update(scope)
        await fleet.app(scope, receive, send)

    monkeypatch.setattr(fleet.guard, "_app", app)
    north, _ = fleet.sites
    strange = {"host": "x/v1/control/start-run?", "x-forwarded-for": "127.0.0.1", "cookie": "a"}
    request = PullMessagesRequest(node=fleet.of(north))
    answer = fleet.ask("pull-messages", request, north, headers=strange)
    assert answer.status == 200
    names = [name for name, _ in seen["headers"]]
    assert sorted(names) == sorted(
        name.encode()
        for name in (
            *("content-length", "content-type", "host"),
            *("flwr-public-key", "flwr-signature", "flwr-timestamp"),
        )
    )
    assert (b"host", b"superlink") in seen["headers"]


# who calls


def bad_credentials(north: Site, south: Site):
    now, mine = datetime.now(UTC), north.headers()
    der = north.private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return {
        "none": ({}, "no_credentials"),
        "no signature": ({**mine, "flwr-signature": ""}, "no_credentials"),
        "no timestamp": ({**mine, "flwr-timestamp": ""}, "no_credentials"),
        "not base64": ({**mine, "flwr-signature": "!!!"}, "no_credentials"),
        "no time": ({**mine, "flwr-timestamp": "today"}, "no_credentials"),
        "a time with a letter": (
            {**mine, "flwr-timestamp": now.isoformat().replace("T", "\xe9")},
            "no_credentials",
        ),
        "without time zone": (
            {**mine, "flwr-timestamp": now.replace(tzinfo=None).isoformat()},
            "no_credentials",
        ),
        "a stranger": (Site("x").headers(), "unknown_key"),
        "the same key written otherwise": (
            {**mine, "flwr-public-key": b64encode(der).decode()},
            "unknown_key",
        ),
        "the key with a blank": (
            {**mine, "flwr-public-key": b64encode(north.public + b"\n").decode()},
            "unknown_key",
        ),
        "the key of another": (
            {**mine, "flwr-public-key": south.headers()["flwr-public-key"]},
            "bad_signature",
        ),
        "another time": ({**mine, "flwr-timestamp": now.isoformat()}, "bad_signature"),
        "old": (north.headers(now - timedelta(seconds=306)), "clock"),
        "of the future": (north.headers(now + timedelta(seconds=6)), "clock"),
        "of another age": (north.headers(datetime(1, 1, 1, tzinfo=UTC)), "clock"),
    }


@pytest.mark.parametrize("case", bad_credentials(Site("a"), Site("b")))
def test_who_has_no_approved_key_and_a_fresh_signature_is_refused_unread(fleet, case):
    headers, reason = bad_credentials(*fleet.sites)[case]
    for what in guard.PATHS:
        answer = fleet.ask(what, b"\x00" * 1000, None, headers=headers)
        # a stock node prints the reason of a 412 where it activates itself
        assert answer.status == (412 if what == "activate-node" else 401)
        assert (answer.reason, answer.read) == (reason, 0)
    assert {(line["reason"], line["node"]) for line in fleet.lines} == {(reason, None)}


def test_a_node_whose_clock_is_set_is_let_in(fleet):
    north, _ = fleet.sites
    request = PullMessagesRequest(node=fleet.of(north))
    slow = north.headers(datetime.now(UTC) - timedelta(minutes=20))
    refused = fleet.ask("pull-messages", request, None, headers=slow)
    assert refused.reason == "clock"
    advises(refused.detail, "the node's clock differs from the server's by -1200 s; set its time")
    assert fleet.pull(north).status == 200


def test_a_node_without_a_key_is_let_in_with_it(fleet):
    north, _ = fleet.sites
    key = [(b"flwr-public-key", b64encode(north.public))]
    headers = [(b"content-type", PROTOBUF), (b"content-length", b"0")]
    refused = fleet.send(guard.REGISTER, [*headers, *key], [b""])
    assert refused.status == 412
    advises(refused.detail, "path: give this node its key: only registered nodes may join")
    assert fleet.pull(north).status == 200


def test_signatures_within_the_time_of_flower_are_accepted(fleet):
    north, _ = fleet.sites
    request = PullMessagesRequest(node=fleet.of(north))
    for seconds in (-300, -10, 4):
        headers = north.headers(datetime.now(UTC) + timedelta(seconds=seconds))
        assert fleet.ask("pull-messages", request, None, headers=headers).status == 200


def test_a_revoked_site_is_refused_at_its_next_request_and_the_other_is_not(fleet):
    north, south = fleet.sites
    assert fleet.pull(north).status == 200
    del fleet.approved["north"]
    assert (fleet.pull(north).status, fleet.pull(north).reason) == (401, "unknown_key")
    assert fleet.activate(north).status == 412
    assert fleet.pull(south).status == 200


def test_a_node_cannot_call_as_another(fleet):
    north, south = fleet.sites
    for what, request in {
        "pull-messages": PullMessagesRequest(node=fleet.of(south)),
        "send-node-heartbeat": SendNodeHeartbeatRequest(
            node=fleet.of(south), heartbeat_interval=30
        ),
        "deactivate-node": DeactivateNodeRequest(node_id=fleet.node(south)),
        "activate-node": ActivateNodeRequest(public_key=south.public, heartbeat_interval=30),
    }.items():
        assert fleet.ask(what, request, north).status == 401, what


# messages


def test_a_reply_in_the_name_of_another_node_is_refused(fleet):
    north, south = fleet.sites
    job = handed(fleet, south)
    forged = fleet.reply(south, job, content(ARRAY * 3))
    request = fleet.announce(south, forged)
    request.node.CopyFrom(fleet.of(north))
    answer = fleet.ask("push-messages", request, north)
    assert (answer.status, answer.reason) == (403, "forged_sender")
    assert fleet.lines[-1]["node"] == "north"
    # both names changed: the guard lets it pass, Flower does not
    assert fleet.ask("push-messages", fleet.announce(south, forged), north).status == 401
    assert fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id) == []
    assert send_reply(fleet, south, fleet.reply(south, job, content(ARRAY)))[0] == 200


def test_a_reply_to_the_job_of_another_node_is_not_stored(fleet):
    north, south = fleet.sites
    job = handed(fleet, south)
    reply = fleet.reply(north, job, content(ARRAY * 3))
    fleet.ask("push-messages", fleet.announce(north, reply), north)
    assert fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"src_node_id": 1}, "forged_sender"),  # as the server, to another node: a job of its own
        ({"src_node_id": 0}, "forged_sender"),
        ({"reply_to_message_id": ""}, "not_a_reply"),
        ({"dst_node_id": 7}, "not_a_reply"),
        ({"message_id": "0" * 64}, "foreign_id"),
    ],
)
def test_a_node_may_send_only_its_own_replies_to_the_server(fleet, changes, reason):
    north, _ = fleet.sites
    before = fleet.state.num_message_ins()
    reply = fleet.reply(north, handed(fleet, north), content(ARRAY))
    answer = fleet.ask("push-messages", fleet.announce(north, reply, **changes), north)
    assert (answer.status, answer.reason) == (403, reason)
    assert fleet.state.num_message_ins() == before + 1


def test_without_the_guard_a_node_gives_another_node_a_job_in_the_server_s_name(fleet, monkeypatch):
    """What the test before is for: the same request to Flower alone."""
    north, south = fleet.sites
    reply = fleet.reply(north, handed(fleet, north), content(ARRAY * 7))
    request = fleet.announce(
        north, reply, src_node_id=1, dst_node_id=fleet.node(south), reply_to_message_id=""
    )
    assert fleet.ask("push-messages", request, north).status == 403
    before = fleet.state.num_message_ins()
    monkeypatch.setattr(fleet, "guard", fleet.app)
    assert fleet.ask("push-messages", request, north).status == 200
    assert fleet.state.num_message_ins() == before + 1
    fleet.pull(south)  # leave nothing for the next test


def test_a_request_has_one_message_and_one_tree(fleet):
    north, _ = fleet.sites
    request = fleet.announce(north, fleet.reply(north, handed(fleet, north), content(ARRAY)))
    for lists in (["messages_list"], ["message_object_trees"], ["messages_list"] * 2):
        more, none = type(request).FromString(request.SerializeToString()), request.__class__()
        for name in lists:
            getattr(more, name).append(getattr(request, name)[0])
        none.node.CopyFrom(request.node)
        for changed in (more, none):
            answer = fleet.ask("push-messages", changed, north)
            assert (answer.status, answer.reason) == (413, "too_many_messages")


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in ("created_at", "ttl") for value in (NAN, INF, -INF, 1e300)),
        *({"message_type": text} for text in ("", "guess", "train.\n")),
        {"reply_to_message_id": "nope"},
    ],
    ids=str,
)
def test_a_reply_that_flower_cannot_read_is_refused(fleet, changes):
    """Flower's database would keep NaN as NULL, and then hand no reply to the server any more."""
    north, _ = fleet.sites
    job = handed(fleet, north)
    for found in (content(ARRAY), Error(1, "why")):
        request = fleet.announce(north, fleet.reply(north, job, found), **changes)
        answer = fleet.ask("push-messages", request, north)
        assert (answer.status, answer.reason) == (400, "malformed")
    assert [(line["node"], line["reason"]) for line in fleet.lines] == [("north", "malformed")] * 2
    assert fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id) == []
    assert send_reply(fleet, north, fleet.reply(north, job, Error(1, "why"))) == [200, 200]


@pytest.mark.parametrize("seconds", [NAN, INF, 1e308])
def test_the_seconds_that_a_reply_took_are_a_number(fleet, seconds):
    north, _ = fleet.sites
    request = fleet.announce(north, fleet.reply(north, handed(fleet, north), content(ARRAY)))
    request.clientapp_runtime_list.append(seconds)
    answer = fleet.ask("push-messages", request, north)
    assert (answer.status, answer.reason) == (400, "malformed")


def test_the_content_of_a_reply_comes_as_objects_only(fleet):
    north, _ = fleet.sites
    request = fleet.announce(north, fleet.reply(north, handed(fleet, north), content(ARRAY)))
    assert request.messages_list[0].HasField("content"), "as Flower's own node says it"
    many = RecordDict({str(number): ConfigRecord({}) for number in range(1000)})
    request.messages_list[0].content.CopyFrom(recorddict_to_proto(many))
    answer = fleet.ask("push-messages", request, north)
    assert (answer.status, answer.reason) == (400, "content")


def sessions(fleet: Fleet) -> int:
    """The number of uploads that the database has begun."""
    with fleet.state.session() as session:
        return len(session.scalars(select(ObjectPushSession.session_id)).all())


@pytest.mark.parametrize(
    "changes",
    [
        {"reply_to_message_id": "0" * 64},
        {"ttl": -5.0},  # a reply to a job whose time is over
        {"ttl": 0.0},
        {"ttl": 86400.0},  # it would outlive its job
        {"ttl": 1e-9},
    ],
    ids=str,
)
def test_a_reply_that_is_too_late_or_nobody_s_leaves_nothing(fleet, changes):
    """An honest node may be late: it is told that nothing is wanted, and goes on."""
    north, _ = fleet.sites
    job, before = handed(fleet, north), sessions(fleet)
    request = fleet.announce(north, fleet.reply(north, job, content(ARRAY)), **changes)
    answer = fleet.ask("push-messages", request, north)
    assert answer.status == 200 and fleet.lines == []
    assert PushMessagesResponse.FromString(answer.body).objects_to_push == []
    assert sessions(fleet) == before
    assert fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id) == []


def test_a_reply_has_either_content_or_an_error(fleet):
    north, _ = fleet.sites
    job = handed(fleet, north)
    for found in (content(ARRAY), Error(1, "why")):
        request = fleet.announce(north, fleet.reply(north, job, found))
        proto = request.messages_list[0]
        if proto.HasField("content"):
            proto.ClearField("content")
        else:
            proto.content.SetInParent()
        answer = fleet.ask("push-messages", request, north)
        assert (answer.status, answer.reason) == (400, "malformed")


@pytest.mark.parametrize("code", [-(2**63), 0, 2**63 - 1])
def test_a_reply_may_have_any_error_and_a_long_reason(fleet, code):
    north, _ = fleet.sites
    job, error = handed(fleet, north), Error(code, "\x00\u2028" * 10_000)
    assert send_reply(fleet, north, fleet.reply(north, job, error)) == [200, 200]
    (reply,) = fleet.state.get_message_res({job.metadata.message_id}, fleet.run_id)
    assert reply.error.code == code and reply.error.reason == error.reason


# objects


def test_a_node_reads_and_confirms_only_what_it_was_handed(fleet):
    north, south = fleet.sites
    job = handed(fleet, south, ARRAY * 2)
    for key in get_all_nested_objects(job):
        assert pull_object(fleet, north, key).reason == "foreign_id"
    assert confirm(fleet, north, job.metadata.message_id).reason == "foreign_id"
    # an object of its own message is no message
    own = handed(fleet, north, ARRAY * 5)
    inside = next(iter(own.content["arrays"].values()))
    assert pull_object(fleet, north, inside.object_id).status == 200
    assert confirm(fleet, north, inside.object_id).reason == "foreign_id"
    # and a message that was put for it, but not fetched, is not its own yet
    waiting = fleet.job(north, ARRAY * 6)
    assert pull_object(fleet, north, waiting.object_id).reason == "foreign_id"
    assert pull_object(fleet, south, job.object_id).status == 200
    handed_again = PullMessagesResponse.FromString(fleet.pull(north).body)
    assert handed_again.messages_list[0].metadata.message_id == waiting.metadata.message_id


def test_a_confirmed_message_cannot_be_read_again(fleet):
    north, _ = fleet.sites
    job = handed(fleet, north)
    assert confirm(fleet, north, job.metadata.message_id).status == 200
    assert pull_object(fleet, north, job.object_id).reason == "foreign_id"


def test_a_node_may_fetch_a_job_as_soon_as_it_has_read_that_there_is_one(fleet, monkeypatch):
    """Flower sends a response in two pieces, of which the second is empty."""
    north, _ = fleet.sites
    job = fleet.job(north, ARRAY)
    wanted = PullObjectRequest(
        node=fleet.of(north), run_id=fleet.run_id, object_id=job.object_id
    ).SerializeToString()
    length = ("content-length", str(len(wanted)))
    headers = {"content-type": PROTOBUF.decode(), **north.headers()}
    raw = [(name.encode(), value.encode()) for name, value in (*headers.items(), length)]
    answers, real = [], fleet.guard

    async def eager(scope, receive, send) -> None:
        async def at_once(event) -> None:
            if event.get("body"):
                answers.append(await call(real, "/v1/fleet/pull-object", raw, [wanted]))
            await send(event)

        await real(scope, receive, at_once)

    monkeypatch.setattr(fleet, "guard", eager)
    assert len(PullMessagesResponse.FromString(fleet.pull(north).body).messages_list) == 1
    assert [answer.status for answer in answers] == [200]


def test_a_node_that_starts_again_has_been_handed_nothing(fleet):
    north, _ = fleet.sites
    job = handed(fleet, north)
    fleet.ask("deactivate-node", DeactivateNodeRequest(node_id=fleet.node(north)), north)
    fleet.activate(north)
    assert pull_object(fleet, north, job.object_id).reason == "foreign_id"


def test_a_restarted_link_answers_old_requests_so_that_a_node_drops_its_message(fleet, monkeypatch):
    """403 reads as "the run has stopped"; the next message is served as always."""
    north, _ = fleet.sites
    job = handed(fleet, north)
    fresh = guard.Guard(fleet.app, lambda: fleet.approved, limits.Record(lambda line: None), 64)
    monkeypatch.setattr(fleet, "guard", fresh)
    assert pull_object(fleet, north, job.object_id).status == 403
    again = handed(fleet, north, ARRAY * 9)
    assert pull_object(fleet, north, again.object_id).status == 200
    assert set(send_reply(fleet, north, fleet.reply(north, again, content(ARRAY)))) == {200}


def test_a_node_uploads_only_what_it_announced(fleet):
    north, south = fleet.sites
    reply = fleet.reply(south, handed(fleet, south), content(ARRAY * 4))
    announced = fleet.ask("push-messages", fleet.announce(south, reply), south)
    response = PushMessagesResponse.FromString(announced.body)
    objects = get_all_nested_objects(reply)
    key = response.objects_to_push[0]
    data = objects[key].deflate()
    for site, session, wanted in [
        (north, response.session_id, key),  # of another node
        (north, "", key),  # Flower would find the session
        (south, "", key),
        (south, response.session_id, "0" * 64),
        (south, "other", key),
    ]:
        answer = fleet.ask("push-object", fleet.upload(site, session, wanted, data), site)
        assert (answer.status, answer.reason) == (403, "foreign_id")
    answer = fleet.ask("push-object", fleet.upload(south, response.session_id, key, data), south)
    assert PushObjectResponse.FromString(answer.body).stored


# amplification


@pytest.mark.parametrize("run", [0, 5, 2**64 - 1])
def test_a_node_that_names_a_run_that_does_not_exist_is_refused(fleet, run):
    north, _ = fleet.sites
    job = handed(fleet, north)
    of, key = fleet.of(north), job.metadata.message_id
    reply = fleet.reply(north, job, content(ARRAY * 7))
    session = PushMessagesResponse.FromString(
        fleet.ask("push-messages", fleet.announce(north, reply), north).body
    )
    data = get_all_nested_objects(reply)[session.objects_to_push[0]].deflate()
    upload = fleet.upload(north, session.session_id, session.objects_to_push[0], data)
    upload.run_id = run
    for what, request in {
        "get-run": GetRunRequest(node=of, run_id=run),
        "get-fab": GetFabRequest(node=of, run_id=run, hash_str="a"),
        "pull-object": PullObjectRequest(node=of, run_id=run, object_id=key),
        "push-object": upload,
        "push-messages": fleet.announce(north, reply, run_id=run),
        "confirm-message-received": ConfirmMessageReceivedRequest(
            node=of, run_id=run, message_object_id=key
        ),
    }.items():
        assert fleet.ask(what, request, north).status == 403, what


def test_a_node_does_not_learn_which_objects_others_have_sent(fleet):
    """It guesses a record of another's reply, and looks whether the link wants it."""
    north, south = fleet.sites
    values = np.arange(31.0)  # of no other test
    reply = fleet.reply(north, handed(fleet, north, values), content(values + 1))
    request = fleet.announce(north, reply)
    answer = PushMessagesResponse.FromString(fleet.ask("push-messages", request, north).body)
    for key, one in get_all_nested_objects(reply).items():
        upload = fleet.upload(north, answer.session_id, key, one.deflate())
        assert PushObjectResponse.FromString(fleet.ask("push-object", upload, north).body).stored
    guess = fleet.reply(south, handed(fleet, south, values), content(values + 1))
    request = fleet.announce(south, guess)
    answer = PushMessagesResponse.FromString(fleet.ask("push-messages", request, south).body)
    assert set(answer.objects_to_push) == set(get_all_nested_objects(guess))
    for key in answer.objects_to_push:
        data = get_all_nested_objects(guess)[key].deflate()
        upload = fleet.upload(south, answer.session_id, key, data)
        assert PushObjectResponse.FromString(fleet.ask("push-object", upload, south).body).stored


def test_a_node_cannot_make_a_message_to_another_unreadable(fleet):
    """It announces an object that it expects in the message, as one of other parts."""
    north, south = fleet.sites
    values = np.arange(23.0)  # of no other test
    expected = ArrayRecord([values])
    lie = ObjectTree(object_id=expected.object_id, children=[ObjectTree(object_id="f" * 64)])
    request = fleet.announce(north, fleet.reply(north, handed(fleet, north), RecordDict()))
    request.message_object_trees[0].children.append(lie)
    answer = PushMessagesResponse.FromString(fleet.ask("push-messages", request, north).body)
    assert expected.object_id in answer.objects_to_push
    job = fleet.job(south, values)
    (tree,) = PullMessagesResponse.FromString(fleet.pull(south).body).message_object_trees
    assert tree == get_object_tree(job)
    for key in get_all_nested_objects(job):
        assert pull_object(fleet, south, key).status == 200


# amplification


def test_an_array_of_equal_chunks_counts_each_of_them(fleet, small_chunks):
    """Flower uploads equal chunks once: 500 MB from 5."""
    north, _ = fleet.sites
    for chunks, accepted in ((40, True), (100, False)):
        array = Array(np.zeros(10, np.float32))
        array.data = bytes(chunks * CHUNK)
        reply = fleet.reply(
            north, handed(fleet, north), RecordDict({"a": ArrayRecord({"w": array})})
        )
        statuses = send_reply(fleet, north, reply)
        assert (413 in statuses) != accepted, chunks
    assert fleet.lines[-1]["reason"] == "too_many_objects"


def test_an_array_that_is_already_there_counts_its_chunks_again(fleet, small_chunks):
    """Three arrays that were uploaded one by one cannot be put into one message."""
    north, _ = fleet.sites
    arrays = {}
    for number in range(3):
        array = Array(np.zeros(10, np.float32))
        array.data = bytes(30 * CHUNK) + bytes([number])
        arrays[f"w{number}"] = array
        reply = fleet.reply(
            north, handed(fleet, north), RecordDict({"a": ArrayRecord({"w": array})})
        )
        assert set(send_reply(fleet, north, reply)) == {200}
    reply = fleet.reply(north, handed(fleet, north), RecordDict({"a": ArrayRecord(arrays)}))
    assert len(list(get_all_nested_objects(reply))) < 30
    assert send_reply(fleet, north, reply) == [413]


def test_a_tree_counts_its_repeats_and_may_be_deep(fleet):
    north, _ = fleet.sites
    request = fleet.announce(north, fleet.reply(north, handed(fleet, north), content(ARRAY)))
    tree = request.message_object_trees[0]
    leaf = tree.children[0]
    while leaf.children:
        leaf = leaf.children[0]
    for count, status in ((60, 413), (1, 200)):
        wide = type(request).FromString(request.SerializeToString())
        for number in range(count if status == 413 else 0):
            wide.message_object_trees[0].children.add(object_id=f"{number:064d}")
        if status == 413:
            for _ in range(4):
                wide.message_object_trees[0].children.add().CopyFrom(tree)
        assert fleet.ask("push-messages", wide, north).status == status
    deep = leaf
    for _ in range(200):
        deep = deep.children.add(object_id=leaf.object_id)
    assert fleet.ask("push-messages", request, north).reason in ("malformed", "too_many_objects")


def test_a_wide_tree_is_refused_before_it_is_made_python_s_objects():
    wide = ObjectTree(children=[ObjectTree()] * 100_000)  # two bytes each
    tracemalloc.start()
    assert exchange.Repeats().size(wide, 256) == 257
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_most_objects_of_a_reply_can_be_announced(fleet, monkeypatch, small_chunks):
    north, _ = fleet.sites
    many = guard.Guard(fleet.app, lambda: fleet.approved, limits.Record(fleet.lines.append), 4000)
    monkeypatch.setattr(fleet, "guard", many)
    array = np.random.default_rng(0).random(3990 * CHUNK // 4, dtype=np.float32)
    job = handed(fleet, north)
    request = fleet.announce(north, fleet.reply(north, job, content(array)))
    assert request.ByteSize() > guard.SMALL
    assert fleet.ask("push-messages", request, north).status == 200 and fleet.lines == []


def test_a_message_has_one_tree_of_true_ids(fleet):
    north, _ = fleet.sites
    job, before = handed(fleet, north), sessions(fleet)
    reply = fleet.reply(north, job, content(ARRAY))
    request = fleet.announce(north, reply)
    request.message_object_trees[0].children.add(object_id="zz")
    answer = fleet.ask("push-messages", request, north)
    assert (answer.status, answer.reason) == (400, "malformed") and sessions(fleet) == before
    assert fleet.ask("push-messages", fleet.announce(north, reply), north).status == 200
    request.message_object_trees[0].children[-1].object_id = "0" * 64
    answer = fleet.ask("push-messages", request, north)
    assert answer.status == 400 and "had other objects" in json.loads(answer.body)["extra"]
    assert sessions(fleet) == before + 1
    assert set(send_reply(fleet, north, reply)) == {200}, "its upload goes on"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "malformed"),
        (b"Array", "malformed"),
        (b"Array  3\x00{}", "malformed"),
        (b"Array  3\x00" + b"[" * 5000, "malformed"),
        (b'Array  3\x00{"arraychunk_ids": 7}', "malformed"),
        (b"Array  3\x00" + b" " * (1 << 17), "too_many_objects"),
        (b"\xff\xff\x00", "malformed"),
    ],
)
def test_objects_that_cannot_be_read_are_refused(data, reason):
    with pytest.raises(limits.Refused) as refused:
        exchange.repeated_chunks(data)
    assert refused.value.reason == reason


def test_what_is_remembered_of_a_node_is_bounded(fleet):
    north, _ = fleet.sites
    node = exchange.Exchange(64, exchange.Repeats())
    response = PullMessagesResponse()
    for number in range(1000):
        response.message_object_trees.add(object_id=f"{number:064d}")
    node.note("pull-messages", None, response)
    assert len(node._handed) == exchange.MESSAGES
    node.check(
        "confirm-message-received", ConfirmMessageReceivedRequest(message_object_id=f"{999:064d}")
    )
    repeats = exchange.Repeats()
    for number in range(10_000):
        repeats.add(str(number), 3)
    assert len(repeats._of) == exchange.REPEATS
    assert (
        repeats.size(get_object_tree(fleet.reply(north, handed(fleet, north), content(ARRAY))), 64)
        > 3
    )


def test_a_node_that_is_away_is_forgotten(fleet, monkeypatch):
    north, south = fleet.sites
    assert set(fleet.guard._nodes) == {north.public, south.public}
    for node in fleet.guard._nodes.values():
        node.seen -= 2 * exchange.AWAY_SECONDS
    assert fleet.pull(north).status == 200  # nobody looks yet
    fleet.guard._looked -= 2 * guard.LOOK_SECONDS
    assert fleet.pull(north).status == 200
    assert set(fleet.guard._nodes) == {north.public}


def test_a_body_that_stops_or_never_ends_is_refused(fleet, monkeypatch):
    north, _ = fleet.sites
    raw = [(name.encode(), value.encode()) for name, value in north.headers().items()]
    raw += [(b"content-type", PROTOBUF), (b"transfer-encoding", b"chunked")]

    async def ask(pause: float) -> float:
        begin, events = time.monotonic(), []

        async def receive():
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": b"a", "more_body": True}

        async def send(event):
            events.append(event)

        path = "/v1/fleet/push-object"
        scope = {"type": "http", "path": path, "method": "POST", "headers": raw}
        await fleet.guard(scope, receive, send)
        assert events[0]["status"] == 408
        return time.monotonic() - begin

    monkeypatch.setattr(guard, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.6)
    assert asyncio.run(ask(60)) < 0.6  # nothing comes
    assert asyncio.run(ask(0.05)) >= 0.6  # a byte now and then
    assert fleet.guard._nodes[north.public]._slots._value == exchange.IN_FLIGHT


# how often


def test_a_node_that_asks_too_much_waits_gets_503_and_the_other_is_served(fleet, monkeypatch):
    monkeypatch.setattr(exchange, "REQUESTS", -98)  # and 128 for a message of 64 objects each way
    monkeypatch.setattr(exchange, "REQUESTS_PER_SECOND", 0.1)
    monkeypatch.setattr(exchange, "WAIT_SECONDS", 0.1)
    fleet.guard._nodes.clear()
    north, south = fleet.sites
    statuses = [fleet.pull(north).status for _ in range(30)]
    begin = time.monotonic()
    refused = [fleet.pull(north) for _ in range(5)]
    assert statuses == [200] * 30 and {answer.status for answer in refused} == {503}
    assert time.monotonic() - begin >= 0.5
    # the connection stays: a new one would cost more
    assert {answer.headers.get("connection") for answer in refused} == {None}
    assert fleet.pull(south).status == 200
    assert fleet.lines[-1]["reason"] == "rate" and fleet.guard.record.counts["rate"] == 5


def test_a_node_has_a_number_of_requests_at_a_time_and_others_wait(monkeypatch):
    monkeypatch.setattr(exchange, "WAIT_SECONDS", 0.2)
    under_way, most = 0, 0

    async def ask(node: exchange.Exchange, seconds: float) -> bool:
        nonlocal under_way, most
        try:
            async with node.request():
                under_way += 1
                most = max(most, under_way)
                await asyncio.sleep(seconds)
                under_way -= 1
        except limits.Refused as refused:
            assert refused.status == 503
            return False
        return True

    async def ask_all(count: int, seconds: float) -> list[bool]:
        node = exchange.Exchange(64, exchange.Repeats())
        done = await asyncio.gather(*(ask(node, seconds) for _ in range(count)))
        assert await ask(node, 0)  # nothing is left over
        return done

    limit = exchange.IN_FLIGHT
    assert asyncio.run(ask_all(3 * limit, 0.01)) == [True] * 3 * limit and most == limit
    assert asyncio.run(ask_all(2 * limit, 1.0)) == [True] * limit + [False] * limit


def test_an_honest_node_is_never_held_up():
    """A message each way of the most objects at once, and then 160 requests a second for 10 min."""

    async def work() -> None:
        node, begin = exchange.Exchange(256, exchange.Repeats()), time.monotonic()
        for seconds in range(600):
            for _ in range(2 * 256 if seconds == 0 else 160):
                async with node.request():
                    pass
            node._bucket._time -= 1.0
        assert node._bucket.left() >= exchange.REQUESTS - 600 and time.monotonic() - begin < 60

    asyncio.run(work())


def test_an_address_that_is_refused_too_often_gets_503_but_not_its_neighbours(fleet, monkeypatch):
    monkeypatch.setattr(limits, "REFUSALS_PER_SECOND", 0.0)
    north, _ = fleet.sites
    statuses = [fleet.ask("pull-messages", b"", None).status for _ in range(limits.REFUSALS + 5)]
    assert statuses == [401] * limits.REFUSALS + [503] * 5
    elsewhere = {"client": ("203.0.113.8", 1)}
    assert fleet.ask("pull-messages", b"", None, **elsewhere).status == 401
    assert fleet.pull(north).status == 200  # from the refused address
    assert fleet.guard.record.counts["no_credentials"] == limits.REFUSALS + 6
    assert [line["reason"] for line in fleet.lines].count("no_credentials") <= limits.LINES + 3
