"""The HTTP client of a site, which takes no more from its server than an answer may have.

Flower's client unpacks a compressed answer without a limit, follows redirections, keeps cookies,
and prints what the server says of versions. Here an answer is plain bytes up to a limit that
depends on the path. It is counted as it comes; httpx bounds the headers.
"""

from __future__ import annotations

from collections.abc import Iterator
from http.cookiejar import DefaultCookiePolicy

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

# most bytes of an answer; a chunk of an array has 5 MiB, and an object that is named has 70 bytes
MOST, MOST_OF = (
    1 << 16,
    {
        "pull-object": 8 << 20,
        "pull-messages": 1 << 20,
        "push-messages": 1 << 20,
        "get-run": 1 << 18,  # with the options of the run, of which a site reads 64 KiB
    },
)


def fleet_client(
    address: str, key: ec.EllipticCurvePrivateKey, root_certificates: bytes | None
) -> FleetHttpClient:
    """A client for the fleet API at `address`, which signs its requests with `key`.

    It raises httpx.RemoteProtocolError for an answer that is compressed or too large.
    """
    client = FleetHttpClient.from_server_address(
        address,
        insecure=root_certificates is None,
        root_certificates=root_certificates,
        interceptors=[_Versions(), NodeAuthHttpInterceptor(key, key.public_key())],
    )
    http = client._client  # the only way to it
    http.follow_redirects = False
    http.headers["accept-encoding"] = "identity"
    http.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    http.event_hooks = {"response": [_bound]}
    return client


class _Versions:
    """Tells the versions of this machine, as Flower's own class; it prints no answer, and does not
    end the process for one.
    """

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        add_headers(context.request, dict(self._metadata.as_metadata()))
        return call_next(context)


def _bound(response: httpx.Response) -> None:
    """Refuse or bound an answer whose head is there, and whose body is not."""
    what = response.request.url.path.rpartition("/")[2]
    if response.headers.get("content-encoding", "identity") != "identity":
        raise httpx.RemoteProtocolError(f"its answer to {what} is compressed")
    assert isinstance(response.stream, httpx.SyncByteStream), "as this is not asyncio"
    response.stream = _Bounded(response.stream, what)


class _Bounded(httpx.SyncByteStream):
    """A body in one piece, because many small ones take much memory."""

    def __init__(self, stream: httpx.SyncByteStream, what: str):
        self._stream, self._what = stream, what

    def __iter__(self) -> Iterator[bytes]:
        most, content = MOST_OF.get(self._what, MOST), bytearray()
        for piece in self._stream:
            content += piece
            if len(content) > most:
                raise httpx.RemoteProtocolError(
                    f"its answer to {self._what} has more than {most:,} bytes"
                )
        yield bytes(content)

    def close(self) -> None:
        self._stream.close()
