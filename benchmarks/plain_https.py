"""A plain HTTPS server that takes a PUT and answers a GET with as many bytes; a reference.

python benchmarks/plain_https.py CERTIFICATE KEY BYTES    # prints its port
"""

from __future__ import annotations

import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

PIECE = 1 << 20


class Handler(BaseHTTPRequestHandler):
    """One connection, which is kept."""

    protocol_version = "HTTP/1.1"
    size = 0

    def do_PUT(self) -> None:
        """Read the body."""
        left = int(self.headers["content-length"])
        while left:
            left -= len(self.rfile.read(min(left, PIECE)))
        self._answer(b"")

    def do_GET(self) -> None:
        """Send a body."""
        self._answer(bytes(self.size))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def there_and_back(url: str, ca: str, size: int) -> float:
    """Seconds of a PUT and a GET of `size` bytes over a connection that is open."""
    with httpx.Client(verify=ssl.create_default_context(cafile=ca), timeout=600) as client:
        client.put(url, content=b"")
        body = bytes(size)
        began = time.monotonic()
        client.put(url, content=body).raise_for_status()
        assert len(client.get(url).content) == size
        return time.monotonic() - began


def main() -> None:
    """Serve until the process is ended."""
    certificate, key, size = sys.argv[1:]
    Handler.size = int(size)
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
