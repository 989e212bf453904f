"""What one node may fetch, confirm and upload: what it was handed, and what it announced.

Flower 1.41 gives every object to every node that knows its id, deletes every message that a node
names, and stores a message under the sender that the message itself names. The ids live in memory
only. After a restart of the link they are gone, and a node's next request for an old object is
refused with 403, with which Flower says that a run has stopped: a node then drops the message and
asks for the next one. Nothing is lost by it, because the ServerApp that sent the message ended with
the link, and the continued run sends the job again.

Flower hands out a message once. If the network loses that answer, the node asks for the next
message, and gets the same answer again: otherwise its job would wait for a reply until its
deadline, or for half a day.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    is_valid_sha256_hash,
)

from fedgpt.flower.deploy.limits import Bucket, Refused

MESSAGES = 32  # messages and uploads of a node that are remembered
REPEATS = 4096  # arrays with repeated chunks that are remembered, of all nodes
LARGEST_ARRAY = 1 << 16  # bytes of the description of an array; its values are in other objects
LONGEST_SECONDS = 366 * 86400.0  # of a message's times, from now or in all
AWAY_SECONDS = 600.0  # a node without a request for so long is forgotten
IN_FLIGHT = 8  # requests of a node at the same time; Flower's own node has at most 4
# Requests of a node: so many a second, and at once so many and a message each way. A node that
# polls 20 times a second and moves 4 objects at a time stays below.
REQUESTS_PER_SECOND, REQUESTS = 200.0, 1000
WAIT_SECONDS = 1.0  # for which a request above these limits waits before it is refused


@dataclass
class _Upload:
    ids: frozenset[str]
    left: int  # objects that it may still grow by
    # arrays that are counted: a node uploads an object again if an answer was lost
    counted: set[str] = field(default_factory=set)


class Repeats:
    """How many more chunks an array has than it has objects: Flower uploads equal chunks once."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, int] = OrderedDict()

    def add(self, object_id: str, more: int) -> None:
        """Remember an array with repeated chunks."""
        self._of[object_id] = more
        if len(self._of) > REPEATS:
            self._of.popitem(last=False)

    def size(self, tree: ObjectTree, most: int) -> int:
        """Objects of a message, each as often as it is in it; `most` + 1 if there are more."""
        count, waiting = 0, [tree]
        while waiting:
            node = waiting.pop()
            count += 1 + self._of.get(node.object_id, 0)
            # before Python makes an object of each child, of which a byte or two is enough
            if count + len(waiting) + len(node.children) > most:
                return most + 1
            waiting.extend(node.children)
        return count


class Exchange:
    """The messages and uploads of one node, and how much it asks for."""

    def __init__(self, reply_objects: int, repeats: Repeats):
        self.seen, self._slots = time.monotonic(), asyncio.Semaphore(IN_FLIGHT)
        self._most, self._repeats = reply_objects, repeats
        self._bucket = Bucket(REQUESTS_PER_SECOND, REQUESTS + 2 * reply_objects)
        self._handed: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._unread: Any = None  # the last answer with a message, until the node acts on it
        self._uploads: OrderedDict[str, _Upload] = OrderedDict()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """A request of the node; raises Refused (503) where it asks for too much for a while.

        A request above the limits waits, so that a node that floods the server is as slow as the
        limits are, and an honest one that is above them for a moment does not notice.
        """
        self.seen = time.monotonic()
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise Refused(503, "rate", "the node sends too many requests at a time") from None
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while not self._bucket.take():
                if time.monotonic() > deadline:
                    raise Refused(503, "rate", "the node sends too many requests")
                await asyncio.sleep(WAIT_SECONDS / 20)
            yield
        finally:
            self._slots.release()

    def lost(self, what: str) -> Any:
        """The answer that the network has lost, if this request shows it; otherwise None.

        A node asks for the run of a message or for its objects, confirms it or replies to it,
        before it asks for another one.
        """
        return self._unread if what == "pull-messages" else None

    def check(self, what: str, request: Any) -> None:
        """Raise Refused where the node must not send this request of Flower's fleet protocol."""
        match what:
            case "push-messages":
                self._check_reply(request)
                self._unread = None
            case "get-run":
                self._unread = None
            case "push-object":
                self._check_object(request)
            case "pull-object":
                if not any(request.object_id in ids for ids in self._handed.values()):
                    raise Refused(403, "foreign_id", "not an object of a message to this node")
                self._unread = None
            case "confirm-message-received":
                if request.message_object_id not in self._handed:
                    raise Refused(403, "foreign_id", "not a message to this node")
                self._unread = None

    def note(self, what: str, request: Any, response: Any) -> None:
        """Remember, or forget, what a request changed that Flower has accepted."""
        match what:
            case "pull-messages":
                for tree in response.message_object_trees:
                    _keep(self._handed, tree.object_id, frozenset(_ids(tree)))
                if response.message_object_trees:  # another question may have got nothing
                    self._unread = response
            case "push-messages" if response.session_id:
                size = self._repeats.size(request.message_object_trees[0], self._most)
                ids = frozenset(response.objects_to_push)
                _keep(self._uploads, response.session_id, _Upload(ids, self._most - size))
            case "confirm-message-received":
                # the id stays: a node repeats a confirmation whose answer was lost
                _keep(self._handed, request.message_object_id, frozenset())
            case "activate-node" | "deactivate-node":
                self._handed.clear()
                self._uploads.clear()
                self._unread = None

    def _check_reply(self, request: Any) -> None:
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise Refused(413, "too_many_messages", "a request must have one message and its tree")
        (message,), (tree,) = request.messages_list, request.message_object_trees
        metadata = message.metadata
        if metadata.src_node_id != request.node.node_id:
            detail = f"the message names node {metadata.src_node_id} as its sender"
            raise Refused(403, "forged_sender", detail)
        if metadata.dst_node_id != SUPERLINK_NODE_ID or not metadata.reply_to_message_id:
            raise Refused(403, "not_a_reply", "a node may send only replies to the server")
        if tree.object_id != metadata.message_id:
            raise Refused(403, "foreign_id", "the objects are not those of the message")
        if self._repeats.size(tree, self._most) > self._most:
            raise Refused(413, "too_many_objects", f"a reply has at most {self._most} objects")
        if message.content.ByteSize():  # which Flower would make Python's objects of
            raise Refused(400, "content", "the content of a reply must come as objects")
        if message.HasField("content") == message.HasField("error"):
            raise Refused(400, "malformed", "a reply has either content or an error")
        if not all(map(is_valid_sha256_hash, [metadata.reply_to_message_id, *_ids(tree)])):
            raise Refused(400, "malformed", "what a reply names is not the id of an object")
        _check_numbers(metadata, request.clientapp_runtime_list)

    def _check_object(self, request: Any) -> None:
        upload = self._uploads.get(request.session_id)
        if upload is None or request.object_id not in upload.ids:
            raise Refused(403, "foreign_id", "not an object that this node announced")
        more = repeated_chunks(request.object_content)
        if more <= 0 or request.object_id in upload.counted:
            return
        if more > upload.left:
            raise Refused(413, "too_many_objects", f"a reply has at most {self._most} objects")
        upload.left -= more
        upload.counted.add(request.object_id)
        self._repeats.add(request.object_id, more)


def _check_numbers(metadata: Metadata, runtimes: Iterable[float]) -> None:
    """Raise Refused (400) for a type that Flower does not know, and for times that are no times.

    Flower compares them, which is False for each NaN, and its database keeps NaN as NULL: then it
    could hand no reply to the server of the run any more. It finds out itself whether a reply came
    too late or would outlive its job, and an honest one may come late.
    """
    try:
        metadata_from_proto(metadata)
    except ValueError:
        raise Refused(400, "malformed", "the type of the message is unknown") from None
    times = [metadata.created_at - now().timestamp(), metadata.ttl, *runtimes]
    if not all(math.isfinite(one) and abs(one) <= LONGEST_SECONDS for one in times):
        raise Refused(400, "malformed", "a time of the message is not a time near to now")


def repeated_chunks(content: bytes) -> int:
    """How many more chunks an object names than it has children: above 0 only for an array.

    Raises Refused (400) for an object that Flower could not read either.
    """
    try:
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind != Array.__qualname__:
            return 0
        if len(content) > LARGEST_ARRAY + 65 * len(children):
            raise Refused(413, "too_many_objects", "the description of an array is too large")
        return len(json.loads(get_object_body(content, Array))["arraychunk_ids"]) - len(children)
    except (ValueError, TypeError, KeyError, RecursionError) as damage:
        raise Refused(400, "malformed", "an object cannot be read") from damage


def _ids(tree: ObjectTree) -> list[str]:
    found = [tree]
    for node in found:  # the list grows in the loop
        found.extend(node.children)
    return [node.object_id for node in found]


def _keep(memory: OrderedDict[str, Any], key: str, value: object) -> None:
    memory[key] = value
    if len(memory) > MESSAGES:
        memory.popitem(last=False)
