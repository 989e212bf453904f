"""The open port: connections are counted and timed before TLS, and end when nothing comes."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import socket
import ssl
import sys
import termios
import time
from functools import partial
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fedgpt.flower.deploy.connections import Connection, Connections
from fedgpt.flower.deploy.guard import Guard
from fedgpt.flower.deploy.limits import Refused, network_of

TLS_SECONDS = 10.0  # to the end of the handshake
REQUEST_SECONDS = 10.0  # from there to the end of the first request's headers
# from a response to the end of the next request's headers; clients of Flower close after 5 s
KEEP_ALIVE_SECONDS = 20
RESPONSE_SECONDS = 1200.0  # in which a client must have read a response: 5 MiB at 40 kbit/s
SHUTDOWN_SECONDS = 2.0  # for the end of TLS
ANSWER_SECONDS = 0.2  # for the answer to leave, before the connection of a refused body ends
HEADERS = 16384  # most bytes of the headers of a request
BACKLOG = 512
_TLS_HANDSHAKE = b"\x16"  # the first byte of every TLS connection
_PLAIN_BODY = b'{"code": 400, "detail": "plaintext: this port speaks TLS; give the CA certificate"}'
_PLAIN_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_PLAIN_BODY), _PLAIN_BODY)
)
# errors of a machine that has too many connections open
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# uvicorn warns of each request that is no HTTP; those are in the record of refusals
_LOGGER = logging.getLogger(__name__)
_LOGGER.setLevel(logging.ERROR)


class Http(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with a limit of time for the headers of each request.

    uvicorn stops its timer at the first byte of a request; here it runs until the request is there.
    """

    def __init__(self, connection: Connection, config: Config, state: ServerState, extra: Any):
        super().__init__(config, state, {**extra, "connection": connection})
        self.connection, self._responded = connection, time.monotonic()
        self.logger = _LOGGER

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Give the first request its time."""
        self.connection.transport = transport
        super().connection_made(transport)
        self._wait(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free the place of this connection."""
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        self.connection.places.forget(self.connection)

    def data_received(self, data: bytes) -> None:
        """Read on; the timer goes on until the headers are complete."""
        self.conn.receive_data(data)
        self.handle_events()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; the application gets no more of it."""
        self.connection.refused(Refused(400, "http", msg))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def on_response_complete(self) -> None:
        """Give the next request its time; of one that was refused the body is not read."""
        self._responded = time.monotonic()
        super().on_response_complete()
        if self.transport.is_closing() and self.conn.their_state is h11.SEND_BODY:
            # uvloop would decrypt what comes until TLS has ended
            self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """End the connection, unless its client still reads a response."""
        if _unread(self.connection.socket) == 0:
            if self.connection.key is None:
                self.connection.refused(Refused(408, "no_request", "no request came"))
            super().timeout_keep_alive_handler()
        elif time.monotonic() - self._responded < RESPONSE_SECONDS:
            self._wait(KEEP_ALIVE_SECONDS)
        else:
            self.transport.abort()

    def _wait(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )


class Listener:
    """Accepts connections for a guard.

    `files` are a certificate and its key; without them there is no encryption. `state` is the
    lifespan state of Flower's application.
    """

    def __init__(self, guard: Guard, files: tuple[str, str] | None, state: dict[str, Any]):
        self._files, self._state = files, state
        self._context = self._new_context()
        self._config, self._server = http_config(guard), ServerState()
        self._places = Connections(guard.addresses, guard.record)
        self._accepting: list[asyncio.Task[None]] = []
        self._sockets: list[socket.socket] = []

    def load_certificate(self) -> None:
        """Use the certificate and key as they are now, for connections from now on.

        Raises OSError, such as ssl.SSLError for a key of another certificate; the old one stays.
        """
        self._context = self._new_context()

    async def start(self, host: str | None, port: int) -> None:
        """Listen on `host`, or on all addresses of this machine if it is None; raises OSError."""
        self._sockets = await _bound(host, port)
        self._accepting = [asyncio.create_task(self._accept(one)) for one in self._sockets]

    def check(self) -> None:
        """Raise the error that ended the acceptance of connections, if any."""
        for task in self._accepting:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """Accept nothing more, and end all connections."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for one in self._sockets:
            one.close()
        ending = set(self._server.tasks)
        for connection in self._places.every():
            ending |= {connection.task} if connection.task is not None else set()
            connection.reset()
        if ending:
            await asyncio.wait(ending, timeout=SHUTDOWN_SECONDS)

    @property
    def port(self) -> int:
        """The port, also where the system was asked to choose one."""
        return self._sockets[0].getsockname()[1]

    def _new_context(self) -> ssl.SSLContext | None:
        if self._files is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.load_cert_chain(*self._files)
        return context

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, peer = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno in _FULL:
                    await asyncio.sleep(0.5)  # until others have ended
                continue
            connection = Connection(self._places, accepted, network_of(peer[0]))
            if self._places.admit(connection):
                connection.task = asyncio.create_task(self._open(connection))
                connection.task.add_done_callback(partial(self._opened, connection))
            else:
                connection.reset()
                accepted.close()

    async def _open(self, connection: Connection) -> None:
        """TLS and then HTTP on a connection."""
        try:
            async with asyncio.timeout(TLS_SECONDS):
                await self._secure(connection)
        except TimeoutError:
            connection.refused(Refused(408, "tls", "no TLS handshake came"))
            connection.reset()
        except ssl.SSLError as error:
            connection.refused(Refused(400, "tls", error.reason or str(error)))
        except Refused as refused:
            connection.refused(refused)
        except OSError:
            pass  # the peer has gone

    def _opened(self, connection: Connection, task: asyncio.Task[None]) -> None:
        """Close a connection that came to no HTTP, also where its task was ended unbegun."""
        connection.task = None
        if connection.transport is None:
            self._places.forget(connection)
            connection.socket.close()

    async def _secure(self, connection: Connection) -> None:
        # asyncio has buffers of 256 KiB for TLS: none for who only connects
        await _readable(connection.socket)
        first = connection.socket.recv(1, socket.MSG_PEEK)
        if not first:
            return
        if self._context is not None and first != _TLS_HANDSHAKE:
            connection.socket.send(_PLAIN_ANSWER)
            connection.socket.recv(HEADERS)  # else the system resets before the answer is read
            raise Refused(400, "plaintext", "a request without TLS")
        await asyncio.get_running_loop().connect_accepted_socket(
            partial(Http, connection, self._config, self._server, self._state),
            connection.socket,
            ssl=self._context,
            ssl_handshake_timeout=TLS_SECONDS if self._context else None,
            ssl_shutdown_timeout=SHUTDOWN_SECONDS if self._context else None,
        )


def http_config(app: Any) -> Config:
    """How uvicorn serves `app` on a connection: HTTP only, and nothing a header says of the peer.

    h11 bounds the headers of a request; uvicorn's other parser does not.
    """
    config = Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=HEADERS,
    )
    config.load()
    return config


def _unread(one: socket.socket) -> int:
    """Bytes that the peer has not received yet; 0 where the system does not tell.

    asyncio does not tell either: its transport for TLS counts only what it has not encrypted yet.
    """
    try:
        return int.from_bytes(fcntl.ioctl(one.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except (OSError, ValueError):
        return 0


async def _readable(one: socket.socket) -> None:
    """Return when there is something to read."""
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(one, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(one)


async def _bound(host: str | None, port: int) -> list[socket.socket]:
    """A listening socket for each address of `host`; raises OSError where there is none."""
    infos = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    found, failure = [], OSError(errno.EADDRNOTAVAIL, "no such address")
    for family, kind, protocol, _, address in dict.fromkeys(infos):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # a machine without IPv6
            failure = error
            continue
        found.append(one)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.setblocking(False)
            one.bind(address)
            one.listen(BACKLOG)
        except OSError as error:
            found.pop().close()
            failure = error
            if error.errno == errno.EADDRINUSE:  # on one address: another server has the port
                break
    else:
        if found:
            return found
    for one in found:
        one.close()
    raise failure
