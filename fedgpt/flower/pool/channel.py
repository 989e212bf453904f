"""Frames between the server and one worker: JSON, Flower's protobuf and at most one descriptor.

Nothing is pickled, so a received frame cannot run code. Arrays are not sent through the socket,
only the descriptor of their shared memory (SCM_RIGHTS).
"""

from __future__ import annotations

import json
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, Metadata, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict  # type: ignore[attr-defined]

from fedgpt.flower.pool.shared_memory import Memory, attach

_HEAD = struct.Struct("!II?")  # bytes of JSON, bytes of body, whether a descriptor belongs to it
_READ = 1 << 18  # largest number of bytes that one call reads from the socket
# a flag of Linux: no child process inherits a received descriptor
_CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


@dataclass(frozen=True)
class Frame:
    """One message on a channel."""

    header: dict[str, Any]
    body: bytes = b""
    memory: Memory | None = None


class Channel:
    """Frames over one Unix stream socket, blocking or not as the socket is set."""

    def __init__(self, sock: socket.socket):
        """Take over `sock`."""
        self._socket = sock
        self._received = bytearray()
        self._memories: deque[Memory] = deque()  # received memories, in the order of their frames
        self._unsent: deque[tuple[memoryview, Memory | None]] = deque()

    def fileno(self) -> int:
        """The socket's descriptor, for a selector."""
        return self._socket.fileno()

    def send(self, frame: Frame) -> bool:
        """Send as much of a frame as the socket accepts; False if `flush` has to send the rest."""
        text = json.dumps(frame.header).encode()
        head = _HEAD.pack(len(text), len(frame.body), frame.memory is not None)
        self._unsent.append((memoryview(head + text + frame.body), frame.memory))
        return self.flush()

    def flush(self) -> bool:
        """Send the remaining bytes; False if the socket is full.

        If the other side has ended, this returns True, and `receive` raises EOFError.
        """
        while self._unsent:
            data, memory = self._unsent[0]
            try:
                if memory is None:
                    sent = self._socket.send(data)
                else:  # the descriptor goes with the first byte
                    sent = socket.send_fds(self._socket, [data], [memory.fileno()])
            except BlockingIOError:
                return False
            except ConnectionError:
                self._unsent.clear()
                break
            if sent < len(data):
                self._unsent[0] = (data[sent:], None)
            else:
                self._unsent.popleft()
        return True

    def receive(self) -> list[Frame]:
        """The frames that one read completes; raises EOFError if the other side has ended."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _READ, 8, _CLOEXEC)
        except BlockingIOError:
            return []
        except ConnectionError:
            data, descriptors = b"", []
        self._memories.extend(Memory(descriptor) for descriptor in descriptors)
        if not data:
            raise EOFError("the other side of the channel has ended")
        self._received += data
        return self._complete()

    def _complete(self) -> list[Frame]:
        frames: list[Frame] = []
        while len(self._received) >= _HEAD.size:
            text, body, attached = _HEAD.unpack_from(self._received)
            start, end = _HEAD.size + text, _HEAD.size + text + body
            if len(self._received) < end:
                break
            header = json.loads(self._received[_HEAD.size : start])
            memory = self._memories.popleft() if attached else None
            frames.append(Frame(header, bytes(self._received[start:end]), memory))
            del self._received[:end]
        return frames

    def close(self) -> None:
        """Close the socket and every descriptor that was not passed on."""
        self._socket.close()
        self._unsent.clear()
        while self._memories:
            self._memories.popleft().close()


@dataclass(frozen=True)
class Content:
    """A RecordDict split into its arrays and everything else, as JSON and protobuf."""

    records: list[tuple[str, list[str] | None]]  # name and, for an ArrayRecord, its keys, in order
    body: bytes
    arrays: list[Array]


def take_apart(content: RecordDict) -> Content:
    """Split `content` without copying its arrays."""
    rest, records, arrays = RecordDict(), [], []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            records.append((name, list(record)))
            arrays.extend(record.values())
        else:
            records.append((name, None))
            rest[name] = record
    return Content(records, recorddict_to_proto(rest).SerializeToString(), arrays)


def put_together(
    records: Sequence[Sequence[Any]], body: bytes, arrays: Sequence[Array]
) -> RecordDict:
    """The RecordDict that `take_apart` split, with its records in their order."""
    rest = recorddict_from_proto(ProtoRecordDict.FromString(body))
    content, left = RecordDict(), iter(arrays)
    for name, keys in records:
        if keys is None:
            content[name] = rest[name]
            continue
        record = ArrayRecord()
        for key in keys:
            record[key] = next(left)
        content[name] = record
    return content


def content_of(frame: Frame) -> RecordDict:
    """The content of a frame; its arrays are views of the frame's memory."""
    arrays = [] if frame.memory is None else attach(frame.memory, frame.header["arrays"])
    return put_together(frame.header["records"], frame.body, arrays)


def metadata_to_json(metadata: Metadata) -> dict[str, Any]:
    """The constructor arguments of `metadata`."""
    return {
        "run_id": metadata.run_id,
        "message_id": metadata.message_id,
        "src_node_id": metadata.src_node_id,
        "dst_node_id": metadata.dst_node_id,
        "reply_to_message_id": metadata.reply_to_message_id,
        "group_id": metadata.group_id,
        "created_at": metadata.created_at,
        "ttl": metadata.ttl,
        "message_type": metadata.message_type,
        "src_task_id": metadata.src_task_id,
        "dst_task_id": metadata.dst_task_id,
    }
