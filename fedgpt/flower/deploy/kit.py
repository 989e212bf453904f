"""A site's files: its kit with the private key, its request, and the approval that comes back.

The kit contains the request, which is signed with the key: so damage to the kit shows, and the
site's name is that for which the operator has approved the key.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import PRIVATE, is_there, sync, write_text
from fedgpt.flower.deploy import documents
from fedgpt.flower.deploy.certificates import check_address, read_ca
from fedgpt.flower.deploy.documents import as_text, document, fingerprint, path_of, written

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ALLOWED = (
    "a site's name has at most 64 letters, digits, dots, dashes and underscores, and begins with a"
    " letter or a digit"
)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A site's name and its public key (PEM), of which it has shown that it has the other half."""

    name: str
    public_key: str
    fingerprint: str


@dataclass(frozen=True)
class Approval:
    """Where the server of a site is, and the CA (PEM) of its certificate."""

    hosts: tuple[str, ...]
    port: int
    ca: str
    issued: str
    ca_fingerprint: str

    @property
    def address(self) -> str:
        """The first host and the port, as Flower takes them: `fed.example.org:9443`."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@dataclass(frozen=True)
class Kit:
    """What a site needs to connect: its name, its private key and the approval."""

    name: str
    private_key: ec.EllipticCurvePrivateKey = field(repr=False)
    approval: Approval


def make_request(name: str, folder: str | Path) -> Request:
    """Make a site's key, and write NAME.kit (private) and NAME.request (for the operator).

    Raises ConfigError for a wrong name or folder and if there is a kit of this name, which is kept.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: {ALLOWED}")
    folder = path_of(folder)
    kit, path = folder / f"{name}.kit", folder / f"{name}.request"
    key = ec.generate_private_key(ec.SECP384R1())  # the kind that Flower's SuperNodes have
    fields = {"name": name, "public_key": documents.public_text(key.public_key())}
    request = documents.signed(written("request", fields | {"made": documents.now()}), key)
    private = {"private_key": documents.private_text(key), "request": request, "approval": None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        documents.create(kit, as_text(written("kit", private)), PRIVATE)
        try:
            write_text(path, as_text(request))
        except OSError:
            kit.unlink()  # nobody has seen its request
            raise
    except OSError as error:
        if is_there(kit):
            raise ConfigError(
                f"{kit}: exists and is never replaced; name another folder with --dir, or move the"
                " kit away if its key is no longer in use"
            ) from None
        raise FedGPTError(f"{kit} and {path.name} cannot be written: {error.strerror}") from None
    return _request(request, str(path))


def read_request(path: str | Path) -> Request:
    """A site's request; raises FedGPTError for one that is damaged or not signed with its key."""
    path = path_of(path)
    return _request(document(path, "request", private=False), str(path))


def read_kit(path: str | Path) -> Kit:
    """A site's kit; an approval beside it, NAME.approval, is joined into a kit that has none.

    Raises FedGPTError for a kit that is damaged, of another user or open to others, and for one
    that is not approved.
    """
    path = path_of(path)
    content = document(path, "kit")
    request = _request(content["request"], f"the request in {path}")
    public = documents.public_key(request.public_key, str(path))
    key = documents.private_key(content["private_key"].encode(errors="replace"), str(path), public)
    if content["approval"] is None:
        approval = _join(path, content, request)
    else:
        approval = _approval(content["approval"], f"the approval in {path}", request)
    return Kit(request.name, key, approval)


def approved(
    request: Request,
    hosts: tuple[str, ...],
    port: int,
    ca: str,
    ca_key: ec.EllipticCurvePrivateKey,
) -> dict[str, Any]:
    """The approval of a request by the server at `hosts`, signed with the key of its CA."""
    fields = {"name": request.name, "public_key": request.public_key, "hosts": list(hosts)}
    fields |= {"port": port, "ca": ca, "issued": documents.now()}
    return documents.signed(written("approval", fields), ca_key)


def _request(content: Any, where: str) -> Request:
    content = documents.checked(content, "request", where)
    key = documents.public_key(content["public_key"], where)
    documents.check_signature(content, key, where)
    if not NAME.fullmatch(content["name"]):
        raise FedGPTError(f"{where}: the name {content['name'][:80]!r} is refused: {ALLOWED}")
    documents.check_time(content["made"], where)
    return Request(content["name"], documents.public_text(key), fingerprint(key))


def _approval(content: Any, where: str, request: Request) -> Approval:
    content = documents.checked(content, "approval", where)
    _, ca_key = read_ca(content["ca"].encode(errors="replace"), f"the CA in {where}")
    documents.check_signature(content, ca_key, where)
    if content["name"] != request.name:
        raise FedGPTError(
            f"{where} is for the site {content['name'][:80]!r}, and the kit is that of"
            f" {request.name!r}"
        )
    key = documents.public_key(content["public_key"], where)
    if documents.public_text(key) != request.public_key:
        raise FedGPTError(
            f"{where} is for the key {fingerprint(key)}, and the kit has the key"
            f" {request.fingerprint}; the operator must approve the request of this kit"
        )
    documents.check_time(content["issued"], where)
    hosts = check_address(content["hosts"], content["port"], where)
    return Approval(hosts, content["port"], content["ca"], content["issued"], fingerprint(ca_key))


def _join(kit: Path, content: Mapping[str, Any], request: Request) -> Approval:
    """Write the approval that lies beside a kit into it."""
    path = kit.parent / f"{request.name}.approval"
    if not is_there(path):
        raise FedGPTError(
            f"{kit} is not approved: give {request.name}.request to the operator of the server, and"
            f" put {path.name}, which comes back, into the folder of the kit"
        )
    found = document(path, "approval", private=False)
    approval = _approval(found, str(path), request)
    temporary = kit.with_name(f".{kit.name}.{secrets.token_hex(8)}")
    try:
        # not `write_text`, which opens its file by name twice: others may write to this folder
        documents.create(temporary, as_text({**content, "approval": found}), PRIVATE)
        temporary.replace(kit)
        sync(kit.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FedGPTError(f"{kit} cannot be written: {error.strerror}") from None
    log.warning(
        "%s now has the approval of the server %s; the fingerprint of its CA is %s",
        *(kit, approval.address, approval.ca_fingerprint),
    )
    return approval
