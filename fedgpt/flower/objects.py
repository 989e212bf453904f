"""Messages as the objects in which Flower sends them, without a second copy of their arrays.

    message - records - arrays - chunks of at most 5 MiB      each is an object and a request

Flower's own functions hold an array several times at once: serialised, in chunks, each chunk once
more with its head, and joined. Here a chunk that is sent is a view of the array, and a chunk that
arrives is appended to the array before the next one is read. The objects that say what a message is
made of are sent first, so that its reader knows where each chunk belongs.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, Message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

CHUNK = 5 << 20  # bytes of one object of an array
# objects of a message besides those of its array: itself, its records, the array's head
OTHER_OBJECTS = 16
AT_ONCE = 4  # requests at a time for the objects of a message, as many as Flower's own node has
Item = TypeVar("Item")
Found = TypeVar("Found")
Read = Callable[[Iterable[str]], Iterator[bytes]]  # ids -> the content of each, in this order


def taken_apart(message: Message) -> tuple[ObjectTree, dict[str, InflatableObject]]:
    """The tree of a message's objects, and the objects by id in the order to send them.

    It sets the message's id, which is that of its first object.
    """
    objects: dict[str, InflatableObject] = {}
    message.metadata.__dict__["_message_id"] = message.object_id
    tree = _collected(message.metadata.message_id, message, objects)
    return tree, dict(sorted(objects.items(), key=lambda one: isinstance(one[1], ArrayChunk)))


# a function of the module: one inside another that calls itself is a reference cycle, which would
# keep the arrays in memory until the garbage collector runs
def _collected(
    object_id: str, one: InflatableObject, objects: dict[str, InflatableObject]
) -> ObjectTree:
    children = [_collected(*child, objects) for child in (one.children or {}).items()]
    objects[object_id] = one
    return ObjectTree(object_id=object_id, children=children)


def order(tree: ObjectTree) -> tuple[list[str], list[str]]:
    """The ids of a tree's objects, each once: those that have children, and then the others."""
    inner, leaves, found = {}, {}, [tree]
    for node in found:  # the list grows in the loop
        (inner if node.children else leaves)[node.object_id] = None
        found.extend(node.children)
    return list(inner), [object_id for object_id in leaves if object_id not in inner]


def is_within(tree: ObjectTree, most: int) -> bool:
    """Whether a tree names at most so many objects, each as often as it names it."""
    return sum(1 for _ in itertools.islice(_named(tree), most + 1)) <= most


def _named(tree: ObjectTree) -> Iterator[str]:
    """Yield the id of every object; protobuf bounds the depth of a tree."""
    left = [tree]
    while left:
        node = left.pop()
        yield node.object_id
        left.extend(node.children)


def put_together(tree: ObjectTree, read: Read) -> Message:
    """The message with the objects of a tree, which are read once, chunks in their order.

    Raises whatever the reading of a malformed message raises.
    """
    inner, leaves = order(tree)
    contents = dict(zip(inner, read(inner), strict=True))
    described = {key: content for key, content in contents.items() if is_array(content)}
    chunks = {chunk for content in described.values() for chunk in chunks_of(content)}
    if not chunks <= set(leaves):
        raise ValueError("an array has other chunks than the message")
    others = [object_id for object_id in leaves if object_id not in chunks]
    contents.update(zip(others, read(others), strict=True))
    if any(is_array(contents[object_id]) for object_id in others):
        raise ValueError("an array whose chunks the message does not name")
    arrays = {key: _array(content, read) for key, content in described.items()}
    records = {
        key: _record(content, arrays)
        for key, content in contents.items()
        if _kind(content) == ArrayRecord.__qualname__
    }
    message = inflate_object_from_contents(tree.object_id, contents, objects={**records})
    if not isinstance(message, Message):
        raise TypeError(f"a {type(message).__name__} in place of a message")
    message.metadata.__dict__["_message_id"] = tree.object_id
    return message


def is_array(content: bytes) -> bool:
    """Whether an object describes an array."""
    return _kind(content) == Array.__qualname__


def is_chunk(content: bytes) -> bool:
    """Whether an object is a chunk of an array; raises ValueError for what is no object."""
    return _kind(content) == ArrayChunk.__qualname__


def chunks_of(content: bytes) -> list[str]:
    """The ids of the chunks of the array that an object describes, with repeats."""
    _, children, _ = get_object_head_values_from_object_content(content)
    return [children[number] for number in _body(content, Array)["arraychunk_ids"]]


def sizes_of_arrays(contents: Iterable[bytes], sizes: Mapping[str, int]) -> Iterator[int]:
    """Yield the bytes of each array among the objects, with every repeat of a chunk.

    `sizes`: id of a chunk -> its bytes.
    """
    for content in contents:
        if is_array(content):
            yield sum(sizes[chunk] for chunk in chunks_of(content))


def _kind(content: bytes) -> str:
    return get_object_head_values_from_object_content(content)[0]


def _body(content: bytes, kind: type[InflatableObject]) -> dict[str, Any]:
    return json.loads(get_object_body(content, kind))


def _array(content: bytes, read: Read) -> Array:
    """The array that an object describes; its chunks are read one after the other."""
    ids = chunks_of(content)
    data, places = bytearray(), {}
    fresh = read(list(dict.fromkeys(ids)))
    for object_id in ids:
        if object_id in places:  # equal chunks are sent once
            start, end = places[object_id]
            data += data[start:end]
        else:
            start = len(data)
            data += get_object_body(next(fresh), ArrayChunk)
            places[object_id] = start, len(data)
    about = _body(content, Array)
    array = Array(about["dtype"], tuple(about["shape"]), about["stype"], b"")
    array.data = data  # type: ignore[assignment]  # like bytes to all that reads it, but no copy
    return array


def _record(content: bytes, arrays: Mapping[str, Array]) -> ArrayRecord:
    """The record that an object describes, with these arrays; Flower's would be of copies."""
    record = ArrayRecord()
    for name, array_id in _body(content, ArrayRecord).items():
        record[name] = arrays[array_id]
    return record


def in_order(
    executor: ThreadPoolExecutor, work: Callable[[Item], Found], items: Iterable[Item]
) -> Iterator[Found]:
    """Yield `work(item)` of each item, AT_ONCE of them under way; what one raises ends it."""
    waiting: deque[Future[Found]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(work, item))
            if len(waiting) == AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:
            one.cancel()
