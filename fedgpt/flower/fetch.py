"""Fetch replies from a SuperLink beside the server's loop.

A client announces its reply with the tree of its objects and then uploads them, which takes as long
as its link needs. Flower's own `pull_messages` waits for the objects, so that one slow upload, or
one that never ends, would hold up the replies of all clients. Here a thread asks for the objects
of all announced replies in turn, takes what has arrived, and hands over complete replies only.

    watch -> announced: too many objects? -> refused, nothing is fetched
                     |  object by object, into a file if the reply is large
                     v
                  complete -> take

A tree names its objects but not their sizes. Flower cuts an array into chunks of at most 5 MiB, so
the number of objects bounds what is fetched. Equal chunks are one object, which an array may name a
million times: so its size is computed before it is put together. All other objects together must be
small, because Python makes numbers and names of them one by one, while the server's loop waits.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import httpx
from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)
from flwr.proto.runtime_pb2 import GetNodesRequest, PullAppMessagesRequest
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt.core.errors import FedGPTError, UpdateRejected
from fedgpt.flower.objects import (
    CHUNK,
    OTHER_OBJECTS,
    is_chunk,
    is_within,
    order,
    put_together,
    sizes_of_arrays,
)

CLOSE_SECONDS = 3.0  # a question may wait for 2 seconds at the link
POLL_SECONDS = 0.05  # between two questions for new replies and objects
NODES_SECONDS = 1.0  # between two questions for the connected nodes
# between two questions for an object that has not arrived
SHORTEST_PAUSE, MOST_PAUSE = 0.02, 0.5
AT_ONCE = 8  # objects of one reply before it is the next reply's turn
# bytes of all objects besides the chunks, and of what Flower puts around each chunk
OTHER_BYTES = 1 << 18
IN_MEMORY = 32 << 20  # larger replies wait in a file until they are taken
# after a question that the SuperLink could not answer, and for so long at most
SHORTEST_RETRY, LONGEST_RETRY, FAILING_SECONDS = 0.5, 20.0, 300.0
log = logging.getLogger(__name__)


class _Download:
    """An announced reply, and those of its objects that have arrived."""

    def __init__(self, tree: ObjectTree, largest: int):
        self.tree, self._largest = tree, largest
        self._left, self._others_left = largest + OTHER_BYTES, OTHER_BYTES  # bytes
        inner, leaves = order(tree)
        self.missing, self._inner = deque(inner + leaves), inner
        self._place: dict[str, tuple[int, int]] = {}  # id -> offset and size
        self._spool = tempfile.SpooledTemporaryFile(  # noqa: SIM115  # `close` or `message` ends it
            max_size=IN_MEMORY
        )
        self.due = 0.0  # when the next object is asked for
        self.pause = SHORTEST_PAUSE

    def add(self, content: bytes) -> None:
        """Keep the content of the next missing object.

        Raises UpdateRejected for a reply with more bytes than it may have, and ValueError for what
        is no object.
        """
        self._left -= len(content)
        if not is_chunk(content):
            self._others_left -= len(content)
        if min(self._left, self._others_left) < 0:
            detail = f"at most {self._largest} bytes of arrays, and {OTHER_BYTES} of other objects"
            raise UpdateRejected("too_large", detail)
        self._place[self.missing.popleft()] = (self._spool.seek(0, os.SEEK_END), len(content))
        self._spool.write(content)
        self.pause = SHORTEST_PAUSE

    def put_off(self) -> None:
        """Ask for the next object later, and later each time that it is not there."""
        self.due = time.monotonic() + self.pause
        self.pause = min(MOST_PAUSE, 2 * self.pause)

    def message(self) -> Message:
        """The complete reply.

        Raises UpdateRejected for one that is too large, and whatever the reading of a malformed one
        raises.
        """
        with self._spool:
            sizes = {object_id: size for object_id, (_, size) in self._place.items()}
            size = sum(sizes_of_arrays(self._read(self._inner), sizes))
            if size > self._largest:
                detail = f"arrays of {size} bytes, at most {self._largest}"
                raise UpdateRejected("too_large", detail)
            return put_together(self.tree, self._read)

    def close(self) -> None:
        """Delete what has arrived."""
        self._spool.close()

    def _read(self, object_ids: Iterable[str]) -> Iterator[bytes]:
        for object_id in object_ids:
            offset, size = self._place[object_id]
            self._spool.seek(offset)
            yield self._spool.read(size)


class _Failing:
    """Since when the SuperLink has not been able to answer, and when it is asked again."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._pause = SHORTEST_RETRY

    def pause(self, error: httpx.HTTPStatusError) -> float:
        """Seconds before the next question; raises FedGPTError after FAILING_SECONDS of failures.

        It doubles with each failure.
        """
        now = time.monotonic()
        self._since = self._since or now
        why = f"{error.request.url.path} with status {error.response.status_code}"
        if now - self._since > FAILING_SECONDS:
            raise FedGPTError(
                f"the SuperLink has answered {why} for {FAILING_SECONDS:.0f} s; its log says why"
            ) from error
        pause, self._pause = self._pause, min(LONGEST_RETRY, 2 * self._pause)
        log.warning("the SuperLink answers %s; asking again in %.1f s", why, pause)
        return pause

    def over(self) -> None:
        """The SuperLink has answered."""
        if self._since is not None:
            log.warning("the SuperLink answers again")
        self._since, self._pause = None, SHORTEST_RETRY


class Fetcher:
    """Two threads that fetch replies from the SuperLink of `grid`.

    One asks which there are, a question that may wait at the link, and one fetches their objects.
    """

    def __init__(self, grid: HttpGrid):
        self._client, self._node, self._run_id = grid._runtime_client, grid.node, grid.run.run_id
        self._changed = threading.Condition()
        self._watched: dict[str, int] = {}  # message id -> bytes of the longest valid reply
        self._cancelled: set[str] = set()
        self._downloads: dict[str, _Download] = {}  # message id of the job -> its reply
        self._complete: deque[tuple[str, _Download | Message | Exception]] = deque()
        self._nodes: Collection[int] = ()
        self._failed: BaseException | None = None
        self._closed = threading.Event()
        self._look_again = 0.0
        self._threads = [
            threading.Thread(target=self._run, args=[step], name="replies", daemon=True)
            for step in (self._look, self._fetch)
        ]
        for thread in self._threads:
            thread.start()

    def watch(self, message_id: str, largest: int) -> None:
        """Fetch the reply to a message once it is announced; `largest`: bytes of a valid one."""
        with self._changed:
            self._watched[message_id] = largest

    def cancel(self, message_ids: Collection[str]) -> None:
        """Fetch these replies no more; each one that comes is an UpdateRejected without content."""
        with self._changed:
            self._cancelled.update(message_ids)

    def take(self) -> tuple[str, Message | Exception] | None:
        """(id of the message, its reply or why it cannot be read), once for each; None for none.

        Raises what has ended a thread, such as Flower's error that the run was stopped, and
        FedGPTError where the SuperLink has not answered a question for FAILING_SECONDS.
        """
        with self._changed:
            if self._failed is not None:
                raise self._failed
            if not self._complete:
                return None
            message_id, found = self._complete.popleft()
        if not isinstance(found, _Download):
            return message_id, found
        try:
            return message_id, found.message()
        except Exception as error:  # a malicious reply may raise any exception
            return message_id, error

    def wait(self, seconds: float) -> None:
        """Return as soon as a reply can be taken, at the latest after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: self._complete or self._failed, seconds)

    def nodes(self) -> Collection[int]:
        """The nodes that were connected a few seconds ago."""
        return self._nodes

    def close(self) -> None:
        """End the threads; a request under way may last longer."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=CLOSE_SECONDS)
        with self._changed:
            waiting = [*self._downloads.values(), *(found for _, found in self._complete)]
        for one in waiting:
            if isinstance(one, _Download):
                one.close()

    # ---- the two threads

    def _run(self, step: Callable[[], bool]) -> None:
        """Take one step after the other, with a pause after one that has moved nothing.

        A step that failed at the SuperLink is taken again: Flower's client asks again only where
        there was no answer.
        """
        failing = _Failing()
        try:
            while not self._closed.is_set():
                began = time.monotonic()
                try:
                    moved = step()
                    failing.over()
                except httpx.HTTPStatusError as error:
                    self._closed.wait(failing.pause(error))
                    continue
                if not moved:
                    # a link of this package has let a question wait for its answer
                    self._closed.wait(POLL_SECONDS - (time.monotonic() - began))
        except BaseException as error:  # Flower's RunNotRunningException is no Exception
            with self._changed:
                self._failed = error
                self._changed.notify_all()

    def _look(self) -> bool:
        """Ask for the connected nodes, if it is time, and for replies; whether there is any."""
        if time.monotonic() >= self._look_again:
            listed = self._client.GetNodes(GetNodesRequest())
            self._nodes = [node.node_id for node in listed.nodes]
            self._look_again = time.monotonic() + NODES_SECONDS
        return self._announced()

    def _fetch(self) -> bool:
        """Ask for objects of each announced reply; whether one has arrived."""
        with self._changed:
            # until there is a download; its objects are asked for as they are due
            self._changed.wait_for(lambda: self._downloads or self._failed, POLL_SECONDS)
            downloads = list(self._downloads.items())
        moved = False
        for key, download in downloads:
            moved |= self._fetched(key, download)
        return moved

    def _announced(self) -> bool:
        """Ask which replies are there, and begin to fetch the new ones; whether any is new."""
        with self._changed:
            asked = list(self._watched)
        if not asked:
            return False
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=asked))
        for proto, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            key = proto.metadata.reply_to_message_id
            with self._changed:
                largest = self._watched.pop(key, None)
                cancelled = key in self._cancelled
            if largest is None:
                continue
            most = OTHER_OBJECTS + -(-largest // CHUNK)
            message_id = proto.metadata.message_id
            if proto.HasField("error"):
                self._done(key, message_id, message_from_proto(proto))
            elif cancelled:
                self._done(key, message_id, UpdateRejected("late", "not fetched"))
            elif not is_within(tree, most):
                detail = f"more than {most} objects"
                self._done(key, message_id, UpdateRejected("too_large", detail))
            else:
                with self._changed:
                    self._downloads[key] = _Download(tree, largest)
                    self._changed.notify_all()
        return bool(found.messages_list)

    def _fetched(self, key: str, download: _Download) -> bool:
        """Fetch the next objects of a reply that have arrived; whether there was any."""
        if key in self._cancelled:
            self._done(
                key, download.tree.object_id, UpdateRejected("late", "not fetched completely")
            )
            return True
        if time.monotonic() < download.due:
            return False
        for number in range(AT_ONCE):
            if not download.missing:
                self._done(key, download.tree.object_id, download)
                return True
            wanted = PullObjectRequest(
                node=self._node, run_id=self._run_id, object_id=download.missing[0]
            )
            found = self._client.PullObject(wanted)
            if found.object_found and not found.object_available:
                download.put_off()
                return number > 0
            if (problem := _added(download, found)) is not None:
                self._done(key, download.tree.object_id, problem)
                return True
        return True

    def _done(self, key: str, message_id: str, found: _Download | Message | Exception) -> None:
        """Hand a reply over, and let the SuperLink delete what it has of it."""
        with self._changed:
            download = self._downloads.pop(key, None)
            if download is not None and download is not found:
                download.close()
            self._cancelled.discard(key)
            self._complete.append((key, found))
            self._changed.notify_all()
        # last, as the server need not wait for it
        confirmed = ConfirmMessageReceivedRequest(
            node=self._node, run_id=self._run_id, message_object_id=message_id
        )
        self._client.ConfirmMessageReceived(confirmed)


def _added(download: _Download, found: PullObjectResponse) -> Exception | None:
    """Keep the object that was asked for; why the reply cannot be taken, if so."""
    if not found.object_found:  # its client is back, or no object has arrived for some minutes
        return UpdateRejected("no_reply", "its upload was broken off")
    try:
        download.add(found.object_content)
    except Exception as error:  # a malicious reply may raise any exception
        return error
    return None
