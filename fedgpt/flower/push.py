"""Sending the server's messages."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid.http_grid import HttpGrid

from fedgpt.flower.objects import AT_ONCE, in_order, taken_apart


def push(grid: Grid, messages: Sequence[Message]) -> list[str | None]:
    """Send messages; the id of each, or none for one that was refused.

    Over a SuperLink Flower's own `push_messages` serialises all objects before it sends the first
    one; here as many are in memory as are being sent.
    """
    if not isinstance(grid, HttpGrid):
        return list(grid.push_messages(messages))
    if not messages:
        return []
    client, run_id = grid._runtime_client, grid.run.run_id
    protos, trees, objects = [], [], dict[str, InflatableObject]()
    for message in messages:
        tree, of_message = taken_apart(message)
        objects |= of_message
        trees.append(tree)
        protos.append(message_to_proto(remove_content_from_message(message)))
    answer = client.PushMessages(
        PushAppMessagesRequest(messages_list=protos, message_object_trees=trees)
    )
    wanted = set(answer.objects_to_push)

    def send(object_id: str) -> None:
        stored = client.PushObject(
            PushObjectRequest(
                node=grid.node,
                run_id=run_id,
                session_id=answer.session_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
            )
        ).stored
        if not stored:
            raise ObjectPushError(object_id, run_id, answer.session_id)

    with ThreadPoolExecutor(AT_ONCE) as executor:
        for _ in in_order(executor, send, [one for one in objects if one in wanted]):
            pass
    return list(answer.message_ids)
