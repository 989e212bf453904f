"""What a server may read of a client's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedgpt.client.fitting import OutOfMemory
from fedgpt.client.texts import SiteText
from fedgpt.client.work import ClientWork
from fedgpt.core.device import out_of_memory
from fedgpt.core.errors import FedGPTError, ForServer


class ClientFailed(Exception):
    """An exception of the client, reported to the server by the name of its class only.

    The exception's message may contain text of the client or paths, so it is only in the client's
    log.
    """

    def __init__(self, error: Exception):
        super().__init__(f"{type(error).__name__} (the client's log has its message)")


@contextmanager
def reported(work: ClientWork) -> Iterator[None]:
    """Raise an exception of the block as ClientFailed, if the server must not read its message."""
    try:
        yield
    except Exception as error:
        told = OutOfMemory(work.options) if out_of_memory(error) else error
        # a FedGPTError is meant for the user, but may quote a record or name a file
        own = isinstance(work.texts, SiteText) or work.options.privacy.unit != "none"
        if not isinstance(told, ForServer if own else FedGPTError):
            told = ClientFailed(told)
        if told is error:
            raise
        raise told from error
