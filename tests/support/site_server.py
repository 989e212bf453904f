"""A server for the tests of one site: made with fedgpt's own commands, guarded, over TLS, in a
thread of this process; and other servers that may have its port.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from support.link import free_port

from fedgpt.flower.deploy import certificates, folder, inner, keys, kit
from fedgpt.flower.deploy.documents import private_text
from fedgpt.flower.deploy.guard import Guard
from fedgpt.flower.deploy.limits import Record
from fedgpt.flower.deploy.listener import Listener
from fedgpt.flower.deploy.registration import register

SITE = "clinic"


class SiteServer:
    """A server's folder, the kit of one site, and a listener that can be started."""

    def __init__(self, root: Path, hosts: tuple[str, ...] = ("127.0.0.1",)):
        self.server = folder.init(root / "server", hosts, free_port())
        self.folder, self.port, self.kit = self.server.folder, self.server.port, root / "clinic.kit"
        kit.make_request(SITE, root)
        keys.approve(self.folder, root / "clinic.request", root)

    def certify(self, hosts: tuple[str, ...] = ("127.0.0.1",), days: float = 0) -> None:
        """A certificate for other hosts, or made some days from now."""
        ca, ca_key = folder.ca_of(self.folder)
        key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
        now = datetime.now(UTC) + timedelta(days=days)
        made = certificates.new_certificate(ca, ca_key, key.public_key(), [*hosts], now)
        (self.folder / "server.pem").write_text(certificates.pem(made))
        (self.folder / "server.key").write_text(private_text(key))

    @property
    def files(self) -> tuple[str, str]:
        return str(self.folder / "server.pem"), str(self.folder / "server.key")

    @contextmanager
    def listening(self, host: str = "127.0.0.1") -> Iterator[Callable[[], int]]:
        """Flower's SuperLink behind its guard, as `fedgpt server` has it, without runs; yields a
        function that counts the connected nodes.
        """
        app = inner.flower_app(self.folder, b"secret")
        state = app.state.linkstate_factory.state()
        register(state, keys.sites(self.folder))
        guard = Guard(app, lambda: keys.sites(self.folder), Record(lambda line: None), 64)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()

        def work(coroutine) -> None:
            asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

        listener = Listener(guard, self.files, {})
        work(listener.start(host, self.port))
        try:
            yield lambda: len(state.get_node_info(statuses=["online"]))
        finally:
            work(listener.stop())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @contextmanager
    def web(self, status: int, body: str, ahead: float = 0.0, tls: bool = True) -> Iterator[None]:
        """A web server at the port, whose clock is `ahead` seconds."""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_POST

            def date_time_string(self, timestamp: float | None = None) -> str:
                moment = datetime.now(UTC).timestamp() + ahead
                return super().date_time_string(moment)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", self.port), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.files)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


REFUSAL = json.dumps({"code": 401, "detail": "no_credentials: the request has no signature"})


@contextmanager
def raw_server(port: int, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """Calls `serve` with each connection to a port, in a thread each."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        listening.settimeout(0.05)
        over = threading.Event()

        def one(connection: socket.socket) -> None:
            with connection, suppress(OSError):  # the other end may close it
                connection.settimeout(20)
                serve(connection)

        def accept() -> None:
            while not over.is_set():
                try:
                    connection, _ = listening.accept()
                except TimeoutError:
                    continue
                threading.Thread(target=one, args=[connection], daemon=True).start()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def proxy(answer: bytes, seen: list[str]) -> Callable[[socket.socket], None]:
    """What a proxy does with a connection: note the request, `answer`, and pass bytes on."""

    def serve(connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1024)
        line = head.split(b"\r\n")[0].decode()
        seen.append(line)
        connection.sendall(answer)
        if b" 200 " not in answer:
            return
        host, _, port = line.split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as onward:
            back = threading.Thread(target=_pump, args=(onward, connection), daemon=True)
            back.start()
            _pump(connection, onward)
            back.join(5)

    return serve


def _pump(source: socket.socket, to: socket.socket) -> None:
    with suppress(OSError):
        while more := source.recv(1 << 16):
            to.sendall(more)
        to.shutdown(socket.SHUT_WR)
