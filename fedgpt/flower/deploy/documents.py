"""The files of a deployment's keys: read only where that is safe, JSON of a known format, signed.

A file is opened once and checked through its descriptor, so that it cannot be exchanged between the
check and the reading. No message shows the content of a file, which may be a private key.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import json
import os
import shlex
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import NoneType
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import once, sync, typed_path

FORMAT = 1
LARGEST = 1 << 24  # bytes of a file; a list of 20,000 sites has fewer
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "kit": {"private_key": (str,), "request": (dict,), "approval": (dict, NoneType)},
    "request": {"name": (str,), "public_key": (str,), "made": (str,), "signature": (str,)},
    "approval": {
        **{"name": (str,), "public_key": (str,), "hosts": (list,), "port": (int,)},
        **{"ca": (str,), "issued": (str,), "signature": (str,)},
    },
    "server": {"hosts": (list,), "port": (int,)},
    "sites": {"sites": (dict,)},
}
# these travel, so that one may be taken for another; server.json and sites.json have fixed names
TRAVELS = ("kit", "request", "approval")
ALGORITHM = ec.ECDSA(hashes.SHA384())


def path_of(typed: str | Path) -> Path:
    """A path as it is typed; raises ConfigError for `~name` without such a home folder."""
    try:
        return typed_path(typed)
    except RuntimeError:
        raise ConfigError(f"{typed}: there is no such home folder") from None


def read(path: Path, private: bool = True) -> bytes:
    """The content of a regular file that is not a link.

    Raises FedGPTError if it cannot be read, is empty or has more than LARGEST bytes, and if it is
    `private` and not of this user, or open to others.
    """
    try:
        # without O_NONBLOCK a named pipe would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FedGPTError(f"{path} is a symbolic link; put the file itself there") from None
        raise FedGPTError(f"{path} cannot be read: {error.strerror}") from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FedGPTError(f"{path} is not a file")
        if private:
            check_private(path, found)
        with os.fdopen(handle, "rb", closefd=False) as stream:
            content = stream.read(LARGEST + 1)
    finally:
        os.close(handle)
    if not content:
        raise FedGPTError(f"{path} is empty")
    if len(content) > LARGEST:
        raise FedGPTError(f"{path} has more than {LARGEST:,} bytes, which no such file has")
    return content


def check_private(path: Path, found: os.stat_result) -> None:
    """Raise FedGPTError unless a file or folder is of this user and closed to all others."""
    if found.st_uid != os.geteuid():
        raise FedGPTError(
            f"{path} belongs to user {found.st_uid}, and this command runs as user"
            f" {os.geteuid()}; run it as the owner"
        )
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        allowed = "700" if stat.S_ISDIR(found.st_mode) else "600"
        raise FedGPTError(
            f"{path} has mode 0{stat.S_IMODE(found.st_mode):o}, so that other users may read or"
            f" change it; close it with: chmod {allowed} {shlex.quote(str(path))}"
        )


def create(path: Path, text: str, mode: int) -> None:
    """Write a file that is new, and has `mode` from its first moment; raises FileExistsError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(handle)
    except BaseException:
        path.unlink()
        raise
    sync(path.parent)


def document(path: Path, kind: str, private: bool = True) -> dict[str, Any]:
    """The content of a JSON file of one of the kinds in FIELDS, with its format, fields and types.

    Raises FedGPTError as `read` does, and for a file that is damaged or of another kind or format.
    """
    try:
        content = json.loads(read(path, private).decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as damage:
        raise FedGPTError(f"{path} is damaged: {damage}") from None
    return checked(content, kind, str(path))


def checked(content: Any, kind: str, where: str) -> dict[str, Any]:
    """`content`, if it is a document of this kind and format; raises FedGPTError."""
    if type(content) is not dict or type(content.get("format")) is not int:
        raise FedGPTError(f"{where} is damaged: it has no format number")
    if content["format"] != FORMAT:
        raise FedGPTError(
            f"{where} has format {content['format']}, and this version of fedgpt reads format"
            f" {FORMAT}; use the version that wrote it, or update fedgpt"
        )
    other = content.get("kind")
    if kind in TRAVELS and other != kind and other in TRAVELS:
        raise FedGPTError(f"{where} is not a site's {kind}, but its {other}")
    fields = FIELDS[kind]
    names = {"format", *fields, *(["kind"] if kind in TRAVELS else [])}
    if set(content) != names or content.get("kind", kind) != kind:
        raise FedGPTError(f"{where} is damaged: its fields must be {', '.join(sorted(names))}")
    for name, types in fields.items():
        if type(content[name]) not in types:
            raise FedGPTError(f"{where} is damaged: {name} has a value of the wrong type")
    return content


def written(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A document of this kind and of the present format."""
    return {"format": FORMAT, **({"kind": kind} if kind in TRAVELS else {}), **fields}


def as_text(content: Mapping[str, Any]) -> str:
    """A document as it is in its file."""
    return json.dumps(content, indent=2) + "\n"


def now() -> str:
    """The time, as documents have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_time(text: Any, where: str) -> None:
    """Raise FedGPTError unless `text` is a time as documents have it."""
    try:
        if datetime.fromisoformat(text).tzinfo is not None:
            return
    except (ValueError, TypeError):
        pass
    raise FedGPTError(f"{where} is damaged: it has a time that is none")


def signed(content: Mapping[str, Any], key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
    """A document with its signature by `key` over all other fields."""
    return {**content, "signature": base64.b64encode(key.sign(_bytes(content), ALGORITHM)).decode()}


def check_signature(content: Mapping[str, Any], key: ec.EllipticCurvePublicKey, where: str) -> None:
    """Raise FedGPTError unless a document is signed by the private half of `key`."""
    try:
        signature = base64.b64decode(content["signature"], validate=True)
        key.verify(signature, _bytes(content), ALGORITHM)
    except (InvalidSignature, binascii.Error, ValueError):
        raise FedGPTError(
            f"{where} is damaged, or was changed by someone: its signature does not fit"
        ) from None


def public_key(text: str, where: str) -> ec.EllipticCurvePublicKey:
    """A site's public key, from PEM; raises FedGPTError unless it is one of the curve P-384."""
    try:
        key = serialization.load_pem_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise FedGPTError(f"{where} is damaged: its public key cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != ec.SECP384R1.name:
        raise FedGPTError(f"{where}: the public key is not an EC key of the curve P-384")
    return key


def private_key(
    content: bytes, where: str, public: ec.EllipticCurvePublicKey | None = None
) -> ec.EllipticCurvePrivateKey:
    """An EC key from PEM; raises FedGPTError unless it is one, and the private half of `public`."""
    try:
        key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise FedGPTError(f"{where} is damaged: its private key cannot be read") from None
    try:
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise InvalidSignature
        # a PEM file has both halves, and damage to one of them need not show when it is read
        (public or key.public_key()).verify(key.sign(b"", ALGORITHM), b"", ALGORITHM)
    except InvalidSignature:
        raise FedGPTError(
            f"{where} is damaged: it has not the private key that belongs here"
        ) from None
    return key


def private_text(key: ec.EllipticCurvePrivateKey) -> str:
    """A private key as PEM (PKCS 8), which OpenSSL and Flower read."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def public_text(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as PEM, in the one form in which Flower compares keys."""
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ).decode()


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """The fingerprint of a public key, `SHA256:...`, as `ssh-keygen -l` prints it."""
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _bytes(content: Mapping[str, Any]) -> bytes:
    """What a signature is over: kind and format are in it, so that it holds for nothing else."""
    unsigned = {name: value for name, value in content.items() if name != "signature"}
    return json.dumps(unsigned, sort_keys=True, separators=(",", ":")).encode("ascii")
