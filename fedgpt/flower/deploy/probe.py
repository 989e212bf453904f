"""One connection to a server, step by step, so that each step can say what is wrong with it.

    name -> address -> TCP, through a proxy if the environment has one -> TLS -> HTTP

A failed step raises Wrong, whose message is for the owner of a site. `passing` says whether
waiting may mend it.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from cryptography import x509

from fedgpt.core.errors import FedGPTError
from fedgpt.core.lines import one_line
from fedgpt.flower.deploy.kit import Approval

SECONDS = 10.0  # longest wait for each step
PATH = "/v1/fleet/pull-messages"
CONTENT = {"content-type": "application/protobuf"}
# OpenSSL's numbers for why a certificate is refused
NOT_YET, EXPIRED, NAME, ADDRESS = 9, 10, 62, 64
MOST_HEAD = 1 << 14  # bytes of a proxy's answer
MOST_ANSWER = 1 << 16  # bytes of a server's answer


class Wrong(FedGPTError):
    """A step that fails."""

    def __init__(self, problem: str, passing: bool = False):
        super().__init__(one_line(problem))  # it may have words of a server that is not trusted
        self.passing = passing


@dataclass(frozen=True)
class Answer:
    """A server's answer to a request without credentials, and its certificate."""

    status: int
    body: str
    date: datetime | None
    certificate: x509.Certificate


def proxy_for(host: str) -> str | None:
    """The proxy through which a client connects to `host`, as the environment has it."""
    proxies = getproxies()
    return None if proxy_bypass(host) else proxies.get("https") or proxies.get("all")


def check_proxies() -> None:
    """Raise Wrong for a proxy of the environment that the client cannot use.

    Flower's HTTP client refuses to start beside a SOCKS proxy, also for hosts in NO_PROXY.
    """
    for kind, proxy in getproxies().items():
        if kind in ("http", "https", "all"):
            _proxy_address(proxy)


def addresses_of(host: str, port: int) -> list[str]:
    """The addresses of a host; raises Wrong for a name that is not known."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Wrong(
            f"{host} is not known here ({error.strerror}); ask the operator whether the name is"
            " right, and the administrator of this network whether it can be resolved here",
            passing=True,
        ) from None
    return list(dict.fromkeys(str(one[4][0]) for one in found))


def connect(host: str, port: int) -> socket.socket:
    """A TCP connection, through the proxy if there is one; raises Wrong."""
    proxy = proxy_for(host)
    via = _proxy_address(proxy) if proxy else (host, port)
    what = f"the proxy {proxy}" if proxy else f"{host}, port {port}"
    try:
        found = socket.create_connection(via, timeout=SECONDS)
    except TimeoutError:
        raise Wrong(
            f"{what} does not answer within {SECONDS:.0f} s: a firewall may drop it; ask for"
            f" outgoing TCP to port {via[1]}",
            passing=True,
        ) from None
    except OSError as error:
        raise Wrong(f"{what} cannot be reached ({error.strerror})", passing=True) from None
    if proxy:
        _tunnel(found, host, port, proxy)
    return found


def ask(host: str, port: int, approval: Approval) -> Answer:
    """The answer of the server to a request without credentials; raises Wrong.

    The certificate is checked as a client does: the CA of the approval, the dates, the name.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # as Flower's client
    context.load_verify_locations(cadata=approval.ca)
    try:
        with context.wrap_socket(connect(host, port), server_hostname=host) as tls:
            found = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
            return _request(tls, (host, port), found)
    except ssl.SSLCertVerificationError as error:
        raise Wrong(_why_refused(host, port, approval, error)) from None
    except ssl.SSLError as error:
        # without a word: as a proxy whose server is down
        ended = isinstance(error, ssl.SSLEOFError)
        raise Wrong(_no_tls(host, port, error.reason or str(error)), passing=ended) from None
    except TimeoutError:
        why = f"{host}, port {port}: accepts connections, but does not answer in {SECONDS:.0f} s"
        raise Wrong(why, passing=True) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Wrong(_no_tls(host, port, str(error)), passing=True) from None


def _request(tls: ssl.SSLSocket, to: tuple[str, int], certificate: x509.Certificate) -> Answer:
    connection = http.client.HTTPConnection(*to, timeout=SECONDS)
    connection.sock = tls
    connection.request("POST", PATH, b"", CONTENT)
    # what http.client reads itself has no limit: a chunk of the length -1, headers without an end
    limited = _Limited(tls)
    with http.client.HTTPResponse(limited, method="POST") as response:  # type: ignore[arg-type]
        response.begin()
        body = response.read(MOST_HEAD).decode("utf-8", "replace")
        date = time_of(response.headers.get("date"))
    return Answer(response.status, body, date, certificate)


class _Limited(io.RawIOBase):
    """What a socket receives, up to MOST_ANSWER bytes and for some seconds; raises Wrong then."""

    def __init__(self, tls: ssl.SSLSocket):
        self._tls, self._left, self._end = tls, MOST_ANSWER, time.monotonic() + 3 * SECONDS

    def makefile(self, mode: str) -> io.BufferedReader:
        """As the one method of a socket that HTTPResponse calls."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._left or time.monotonic() > self._end:
            raise Wrong("the server's answer has no end; ask the operator for the port")
        count = self._tls.recv_into(buffer, min(len(buffer), self._left))
        self._left -= count
        return count


def time_of(header: str | None) -> datetime | None:
    """The time in a Date header; None if there is none."""
    try:
        found = parsedate_to_datetime(header or "")
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.tzinfo is not None else None


def seconds_behind(date: datetime) -> float:
    """Seconds by which this machine's clock is behind that of a server."""
    return (date - datetime.now(UTC)).total_seconds()


def clocks(date: datetime) -> str:
    """How far this machine's clock and that of a server are apart."""
    behind = seconds_behind(date)
    which = "behind" if behind > 0 else "ahead of"
    return f"this machine's clock is {abs(behind):.0f} s {which} the server's"


def _why_refused(
    host: str, port: int, approval: Approval, error: ssl.SSLCertVerificationError
) -> str:
    """What is wrong with the certificate of a server, which is read without trusting it."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(connect(host, port), server_hostname=host) as tls:
        found = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    now = datetime.now(UTC)
    if error.verify_code == NOT_YET:
        return (
            f"the server's certificate is valid from {begin:%Y-%m-%d %H:%M} UTC, and it is"
            f" {now:%Y-%m-%d %H:%M} UTC here; set the clock of this machine"
        )
    if error.verify_code == EXPIRED:
        return (
            f"the server's certificate ended on {end:%Y-%m-%d %H:%M} UTC, and it is"
            f" {now:%Y-%m-%d %H:%M} UTC here; if this clock is right, ask the operator for: fedgpt"
            " keys renew"
        )
    if error.verify_code in (NAME, ADDRESS):
        return (
            f"the server's certificate is for {', '.join(_names(found))}, and not for {host}; ask"
            f" the operator to add {host} to server.json and to renew the certificate"
        )
    return (
        "the server's certificate is not of the CA in the kit"
        f" ({approval.ca_fingerprint}; {error.verify_message}): this is another server, or someone"
        " is in between; ask the operator which CA the server has"
    )


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ["no host"]
    hosts = [*names.get_values_for_type(x509.DNSName), *names.get_values_for_type(x509.IPAddress)]
    return list(map(str, hosts)) or ["no host"]


def _no_tls(host: str, port: int, why: str) -> str:
    """What answers at a port that does not speak TLS."""
    try:
        with closing(connect(host, port)) as plain:
            plain.settimeout(2.0)
            plain.sendall(f"GET / HTTP/1.0\r\nhost: {host}\r\n\r\n".encode())
            head = plain.recv(64)
    except (OSError, Wrong):
        head = b""
    what = "a server without TLS" if head.startswith(b"HTTP/") else "no TLS server"
    return (
        f"{host}, port {port}: {what} answers there ({why}); ask the operator for the port of"
        " fedgpt's server, or whether it runs with --insecure"
    )


def _proxy_address(proxy: str) -> tuple[str, int]:
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme != "http" or not parts.hostname:
        raise Wrong(
            f"the environment has the proxy {proxy}, which is not of the form http://HOST:PORT;"
            " start the client without that variable, such as with: env -u HTTPS_PROXY fedgpt ..."
        )
    return parts.hostname, parts.port or 80


def _tunnel(found: socket.socket, host: str, port: int, proxy: str) -> None:
    """Ask a proxy for a connection; raises Wrong if it refuses."""
    to = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found.sendall(f"CONNECT {to} HTTP/1.1\r\nhost: {to}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head and len(head) < MOST_HEAD:
            if not (more := found.recv(1)):  # not a byte of what follows the answer
                break
            head += more
    except OSError as error:
        raise Wrong(f"the proxy {proxy} does not answer ({error})", passing=True) from None
    line = head.split(b"\r\n", 1)[0].decode("latin-1")
    if " 200" not in line[:13]:
        found.close()
        raise Wrong(
            f"the proxy {proxy} does not connect to {to} ({line or 'no answer'}); allow it there,"
            f" or put {host} into NO_PROXY",
            passing=True,
        )


def proxy_variable() -> str:
    """The variable of the environment that names the proxy."""
    names = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    return next((name for name in names if os.environ.get(name)), "the system's settings")
