"""A site in a thread of this process: its real app at a real SuperLink."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from support.sites import Texts
from support.superlink import LiveSuperLink, in_thread, send

from fedgpt.client.policy import Policy
from fedgpt.flower.deploy.connection import UploadEnded
from fedgpt.flower.deploy.node import _Heartbeats
from fedgpt.flower.deploy.site_app import site_app
from fedgpt.flower.site_config import site_of


@contextmanager
def site_in_thread(
    link: LiveSuperLink,
    texts: Texts,
    name: str,
    policy: Policy | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> Iterator[None]:
    """A connected site, until the end of the block."""
    site = site_of(texts.config(name))
    assert site is not None, "the configuration has a text"
    app = site_app(site, policy or Policy())
    node, connection = link.node(key)
    config = connection.run_config(link.run_id)
    context = Context(link.run_id, node, {}, RecordDict(), config)
    over = threading.Event()

    def answer() -> None:
        while not over.is_set():
            message = None
            with suppress(httpx.TransportError):  # the machine may be very busy
                message = connection.receive()
            if message is None:
                over.wait(0.02)
                continue
            try:
                reply = app(message, context)
            except Exception as error:  # as the persistent node tells it
                reply = Message(Error(2, repr(error)), reply_to=message)
            with suppress(UploadEnded):
                send(connection, reply)

    with _Heartbeats(connection):
        thread = in_thread(answer)
        try:
            yield
        finally:
            over.set()
            thread.join(60)
    connection.deactivate()
