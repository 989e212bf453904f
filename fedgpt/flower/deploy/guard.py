"""What the open network may ask of Flower's SuperLink: an ASGI application around Flower's own.

It is around the application, not a middleware in it, because Flower reads and parses a whole
request before it looks who sent it. The order here: path, headers, sender, rate, body, content.
Answers are JSON as Flower's, so that a stock node prints their reason.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from google.protobuf.message import DecodeError, Message

from fedgpt.flower.deploy.credentials import authenticate
from fedgpt.flower.deploy.exchange import AWAY_SECONDS, Exchange, Repeats
from fedgpt.flower.deploy.limits import Addresses, Record, Refused, network_of
from fedgpt.flower.deploy.waiting import (
    App,
    Bell,
    Event,
    Receive,
    Send,
    Wish,
    let_wait,
    replayed,
    says,
)

Sites = Callable[[], Mapping[str, bytes]]

FLEET = "/v1/fleet/"
REGISTER = f"{FLEET}register-node"
SMALL, OBJECT = 1 << 16, 8 << 20  # most bytes of a body; Flower's chunks: 5 MiB
ENTRY = 96  # further bytes of an announced reply for each object that it may have; Flower's: 68
PATHS = {
    "activate-node": SMALL,
    "deactivate-node": SMALL,
    "send-node-heartbeat": SMALL,
    "pull-messages": SMALL,
    "push-messages": SMALL,  # and an ENTRY for each object
    "get-run": SMALL,
    "get-fab": SMALL,
    "push-object": OBJECT,
    "pull-object": SMALL,
    "confirm-message-received": SMALL,
}
# requests whose success changes what a node may do next -> the class of the response, if it is read
NOTED = {
    "activate-node": None,
    "deactivate-node": None,
    "confirm-message-received": None,
    "pull-messages": PullMessagesResponse,
    "push-messages": PushMessagesResponse,
}
# the answer for an object that the server is still sending
NOT_YET = PullObjectResponse(object_found=True).SerializeToString()
# a body ends after so many seconds at the latest, as an upload of Flower's, or after a pause
BODY_SECONDS, PAUSE_SECONDS = 180.0, 20.0
LOOK_SECONDS = 60.0  # between two looks which nodes are away


class Guard:
    """Flower's application for approved sites only; refuses everything else, and records it.

    `sites()` has the public keys (PEM) of the sites that are approved now, by name. A reply has at
    most `reply_objects` objects (chunks of 5 MiB, and about 16), equal ones counted each.
    """

    def __init__(
        self, app: App, sites: Sites, record: Record, reply_objects: int, bell: Bell | None = None
    ):
        """`bell` rings for what the app stores; without it no request waits."""
        self.addresses, self.record = Addresses(), record
        self._app, self._sites, self._most = app, sites, reply_objects
        self._longest = PATHS | {"push-messages": SMALL + ENTRY * reply_objects}
        self._repeats, self._bell = Repeats(), bell
        self._nodes: dict[bytes, Exchange] = {}
        self._looked = time.monotonic()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":  # a websocket: Flower has none
            return
        address = network_of((scope.get("client") or ("", 0))[0])
        what, name = "", None
        try:
            what = checked_path(scope)
            headers = checked_headers(scope["headers"], self._longest[what])
            name, key = authenticate(headers, self._sites())
            self.addresses.known(address)
            if (connection := scope.get("state", {}).get("connection")) is not None:
                connection.authenticated(key)
            node = self._node(key)
            async with node.request():
                body = await read_body(receive, self._longest[what])
                request = parsed(what, body)
                node.check(what, request)
                if (lost := node.lost(what)) is not None:
                    await _answer_again(send, lost)
                    return
                inner = _inner_scope(scope, headers, len(body))
                noting = _noting(node, what, request, send)
                wish = _wish(what, request)
                if wish is None or self._bell is None:
                    await self._app(inner, replayed(body, receive), noting)
                    return
                events = await let_wait(self._app, inner, body, receive, self._bell, wish)
                if says(events, wish.nothing) and (lost := node.lost(what)) is not None:
                    await _answer_again(send, lost)  # an earlier question got it in the meantime
                    return
                for event in events:
                    await noting(event)
        except Refused as refused:
            self.record.add(refused, address, name, scope["path"])
            if name is None and not self.addresses.refused(address):
                refused = Refused(503, "rate", "too many refused requests from this address")
            await _answer(send, refused, what, close=name is None or refused.reason != "rate")

    def _node(self, key: bytes) -> Exchange:
        """The node with this key."""
        self._forget()
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = Exchange(self._most, self._repeats)
        return node

    def _forget(self) -> None:
        """Forget nodes that are away; what they had announced is over at Flower's, too."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for key, node in list(self._nodes.items()):
            if now - node.seen > AWAY_SECONDS:
                del self._nodes[key]


def checked_path(scope: Event) -> str:
    """The last part of a fleet path; raises Refused (403) for all but POST to the ten of them.

    The path as it was sent must be this text, too: no percent signs, no second slash, no query.
    Where a node without a key registers itself, it is 412, which Flower says there, too.
    """
    path, what = scope["path"], scope["path"].removeprefix(FLEET)
    plain = scope.get("raw_path", path.encode()) == path.encode() and not scope.get("query_string")
    if path == REGISTER and scope["method"] == "POST":  # a stock node without a key
        raise Refused(412, "path", "give this node its key: only registered nodes may join")
    if what not in PATHS or path != FLEET + what or not plain or scope.get("root_path"):
        raise Refused(403, "path", "this address serves approved sites only")
    if scope["method"] != "POST":
        raise Refused(403, "method", "this address serves approved sites only")
    return what


def checked_headers(raw: list[tuple[bytes, bytes]], most: int) -> dict[str, str]:
    """The headers; raises Refused where Flower and another reader could take them for different.

    400 for a header that stands twice or for a strange length, 413 for a length above `most`,
    415 for another content than protobuf.
    """
    headers: dict[str, str] = {}
    for name, value in raw:
        key = name.decode("latin-1").lower()
        if key in headers and (key.startswith(("content-", "flwr-")) or key in ("host",)):
            raise Refused(400, "header", f"the header {key} stands twice")
        headers[key] = value.decode("latin-1")
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding not in (None, "chunked") or (coding is None) == (length is None):
        raise Refused(400, "length", "a request needs a content-length, or to be chunked")
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 20):
        raise Refused(400, "length", "the content-length is not a number")
    if length is not None and int(length) > most:
        raise Refused(413, "too_large", f"a body has at most {most} bytes")
    if headers.get("content-type") != PROTOBUF_MEDIA_TYPE or "content-encoding" in headers:
        raise Refused(415, "content_type", f"the content must be {PROTOBUF_MEDIA_TYPE}")
    return headers


async def read_body(receive: Receive, most: int) -> bytes:
    """The body of a request; raises Refused (413) above `most` bytes, (408) where it stalls."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                async with asyncio.timeout(PAUSE_SECONDS):
                    event = await receive()
                if event["type"] == "http.disconnect":
                    raise Refused(400, "broken_off", "the request was broken off")
                body += event.get("body", b"")
                if len(body) > most:
                    raise Refused(413, "too_large", f"a body has at most {most} bytes")
                if not event.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "slow", "the body of the request did not come") from None


def parsed(what: str, body: bytes) -> Message:
    """The protobuf message of a request; raises Refused (400)."""
    request = PROTOBUF_REQUEST_TYPES["POST", FLEET + what]()
    try:
        request.ParseFromString(body)
    except DecodeError:
        raise Refused(400, "malformed", "the body is not the message of this path") from None
    return request


def _wish(what: str, request: Any) -> Wish | None:
    """What a request waits for, if it may."""
    match what:
        case "pull-messages":
            return Wish(request.node.node_id, b"")
        case "pull-object":
            return Wish(request.object_id, NOT_YET)
    return None


def _inner_scope(scope: Event, headers: Mapping[str, str], length: int) -> Event:
    """What Flower sees: only headers that it needs, so that none can mean something else to it."""
    kept = [(name, value) for name, value in headers.items() if name.startswith("flwr-")]
    kept += [("content-type", PROTOBUF_MEDIA_TYPE), ("content-length", str(length))]
    state = {key: value for key, value in scope.get("state", {}).items() if key != "connection"}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
    return {**scope, "headers": [*raw, (b"host", b"superlink")], "state": state}


def _noting(node: Exchange, what: str, request: Message, send: Send) -> Send:
    """A send that first notes at `node` what a successful response changes.

    The content is held back until it is whole: a node that has read it asks for more at once.
    """
    if what not in NOTED:
        return send
    kind, status, content = NOTED[what], 0, bytearray()

    async def noting(event: Event) -> None:
        nonlocal status
        if event["type"] == "http.response.start":
            status = event["status"]
        elif status == 200:
            content.extend(event.get("body", b""))
            if event.get("more_body", False):
                return
            node.note(what, request, kind.FromString(bytes(content)) if kind else None)
            event = {**event, "body": bytes(content)}
        await send(event)

    return noting


async def _answer_again(send: Send, response: Message) -> None:
    """Give an answer of Flower's once more."""
    body = response.SerializeToString()
    headers = [(b"content-type", PROTOBUF_MEDIA_TYPE.encode())]
    headers += [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _answer(send: Send, refused: Refused, what: str, close: bool) -> None:
    """Answer a refused request, and close its connection; a new one would cost more."""
    status, code = refused.status, refused.status
    if status == 401 and what == "activate-node":
        # as Flower answers an unknown key: a stock node prints the reason of this one, and ends
        # without a word at a 401
        status, code = 412, int(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    elif status == 412:
        code = int(ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED)
    detail = f"{refused.reason}: {refused.detail}"
    body = json.dumps({"code": code, "detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    # with which a site finds out that its clock is wrong
    headers += [(b"date", formatdate(usegmt=True).encode())]
    headers += [(b"connection", b"close")] if close else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
