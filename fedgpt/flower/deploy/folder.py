"""A server's folder: its CA, the certificate for its hosts, and where clients reach it.

All files are of one user and closed to others. Only `approve`, `renew` and their like read the key
of the CA; a server that runs does not.
"""

from __future__ import annotations

import secrets
import shlex
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock, Timeout

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import PRIVATE, is_there, sync, write_text
from fedgpt.core.options.option import short
from fedgpt.flower.deploy import certificates, documents
from fedgpt.flower.deploy.certificates import LAST_PORT, check_address, host_of, pem
from fedgpt.flower.deploy.documents import as_text, document, fingerprint, path_of, read, written

PORT = 9443
SOON = 30  # days before its end from which a certificate should be renewed
REPLY_OBJECTS = 256  # of a reply; an update of 124 million float32 numbers has about 120
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # where no other machine can listen
PATIENCE = 10  # seconds to wait for another command that changes the folder
FILES = CA_KEY, CA, KEY, CERTIFICATE, SITES, SETTINGS = (
    *("ca.key", "ca.pem", "server.key", "server.pem", "sites.json", "server.json"),
)


@dataclass(frozen=True)
class Server:
    """The folder of a server, and what its files say."""

    folder: Path
    hosts: tuple[str, ...]
    port: int
    expires: datetime
    certified: tuple[str, ...]  # hosts in the certificate
    ca_expires: datetime
    ca_fingerprint: str

    @property
    def warning(self) -> str:
        """What the operator has to do soon, because a certificate ends; empty if nothing."""
        end, what, remedy = min(
            (
                self.ca_expires,
                "CA",
                "make another folder, and approve a new request of each site in it",
            ),
            (
                self.expires,
                "certificate",
                f"renew it with: fedgpt keys renew {shlex.quote(str(self.folder))}",
            ),
        )
        days = (end - datetime.now(UTC)).days
        if days >= SOON:
            return ""
        when = f"ends in {days} days" if days >= 0 else "has ended"
        return f"the {what} {when} ({end:%Y-%m-%d}); {remedy}"


def init(folder: str | Path, hosts: Sequence[str], port: int = PORT) -> Server:
    """Make the folder of a server that is reached at `hosts`; all of it, or nothing.

    Raises ConfigError for a wrong host or port, and if the folder exists and is not empty.
    """
    path = path_of(folder)
    if problems := list(_problems(path, hosts, port)):
        raise ConfigError(problems)
    names = list(dict.fromkeys(map(host_of, hosts)))
    now = datetime.now(UTC)
    ca_key, ca = certificates.new_ca(now)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certificates.new_certificate(ca, ca_key, key.public_key(), names, now)
    contents = (
        *(documents.private_text(ca_key), pem(ca), documents.private_text(key), pem(certificate)),
        as_text(written("sites", {"sites": {}})),
        as_text(written("server", {"hosts": names, "port": port})),
    )
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        for name, content in zip(FILES, contents, strict=True):
            documents.create(temporary / name, content, PRIVATE)
        temporary.rename(path)  # fails if another command has made the folder meanwhile
        sync(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise FedGPTError(f"{path} cannot be made: {error.strerror}") from None
    return read_server(path)


def _problems(path: Path, hosts: Sequence[str], port: int) -> Iterator[str]:
    try:
        taken = is_there(path) and (path.is_symlink() or any(path.iterdir()))
    except OSError:  # a file, or a folder that is closed to this user
        taken = True
    if taken:
        yield f"{path}: exists and is never replaced; name a folder that is new or empty"
    if not hosts:
        yield "--host: name at least one host name or IP address by which clients reach the server"
    for host in hosts:
        try:
            host_of(host)
        except ValueError as reason:
            yield f"--host {host}: {reason}"
    if not 1 <= port <= LAST_PORT:
        yield f"--port {short(port)}: must be from 1 to {LAST_PORT}"


def read_server(folder: str | Path) -> Server:
    """The folder of a server; raises FedGPTError if a file of it is missing, damaged, not of this
    user or open to others, or does not fit the others. The certificate may have ended.
    """
    path = checked_folder(folder)
    hosts, port = _address(path)
    ca, ca_public = certificates.read_ca(read(path / CA), str(path / CA))
    where = path / CERTIFICATE
    certificate, public, certified = certificates.read_certificate(read(where), ca, str(where))
    documents.private_key(read(path / KEY), str(path / KEY), public)
    if missing := [host for host in hosts if host not in certified]:
        raise FedGPTError(
            f"{where} is not for the host {missing[0]} of {SETTINGS}; make one that is with:"
            f" fedgpt keys renew {shlex.quote(str(path))}"
        )
    return Server(
        folder=path,
        hosts=hosts,
        port=port,
        expires=certificate.not_valid_after_utc,
        certified=certified,
        ca_expires=ca.not_valid_after_utc,
        ca_fingerprint=fingerprint(ca_public),
    )


def renew(folder: str | Path) -> Server:
    """Write a new certificate for the hosts in server.json, with the server's key and its CA.

    The key stays, so that one file changes, which fits the others at every moment. A new key would
    protect nothing: who could read the old one could read ca.key, which lies beside it.
    """
    path = checked_folder(folder)
    hosts, _ = _address(path)
    with changing(path):
        ca, ca_key = ca_of(path)
        key = documents.private_key(read(path / KEY), str(path / KEY)).public_key()
        certificate = certificates.new_certificate(ca, ca_key, key, hosts, datetime.now(UTC))
        write_text(path / CERTIFICATE, pem(certificate), mode=PRIVATE)
    return read_server(path)


def ca_of(path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The CA of a server's folder and its private key; raises FedGPTError as `read_server` does."""
    ca, public = certificates.read_ca(read(path / CA), str(path / CA))
    return ca, documents.private_key(read(path / CA_KEY), str(path / CA_KEY), public)


def checked_folder(folder: str | Path) -> Path:
    """The path of a server's folder; raises FedGPTError if it is none, a link, or not private."""
    path = path_of(folder)
    try:
        found = path.lstat()
    except OSError as error:
        raise FedGPTError(
            f"{path} cannot be read: {error.strerror}; a server's folder is made with: fedgpt keys"
            f" init {shlex.quote(str(path))} --host NAME"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a folder"
        raise FedGPTError(f"{path} is {kind}; name the folder of a server")
    documents.check_private(path, found)
    return path


def checked_host(host: str | None, insecure: bool) -> str | None:
    """The address to listen on, None for all of this machine.

    Raises ConfigError if it is `insecure`, without TLS, and not a loopback address.
    """
    if not insecure:
        return host
    if host not in (None, *LOOPBACK):
        raise ConfigError(
            f"--insecure --host={host}: without TLS a server listens on this machine alone; leave"
            f" out --insecure, or take --host={LOOPBACK[0]}"
        )
    return host or LOOPBACK[0]


def checked_reply_objects(number: int) -> int:
    """The most objects of a reply; raises ConfigError if there are none."""
    if number < 1:
        raise ConfigError(f"--reply-objects={number}: must be at least 1")
    return number


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold the lock of a server's folder; raises FedGPTError if another command has it for long,
    or if the block cannot write its files.
    """
    try:
        with FileLock(path / ".lock", timeout=PATIENCE, mode=PRIVATE):
            yield
    except Timeout:
        raise FedGPTError(
            f"{path}: another command has been changing this folder for {PATIENCE} s"
        ) from None
    except OSError as error:
        raise FedGPTError(f"{path} cannot be changed: {error.strerror}") from None


def _address(path: Path) -> tuple[tuple[str, ...], int]:
    settings = document(path / SETTINGS, "server")
    hosts = check_address(settings["hosts"], settings["port"], str(path / SETTINGS))
    return hosts, settings["port"]
