"""The list of sites whose keys the operator of a server has approved.

A site makes its key and a request (kit.py), the operator approves the request here, and the site
joins the approval into its kit. No private key travels. The server knows a site by its key alone;
its name is the stable id of the client in a run.

A key that was replaced or revoked stays in the list, because it must not come back: Flower, too,
never takes a key twice.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fedgpt.core.errors import ConfigError, FedGPTError, nearest
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.flower.deploy import documents
from fedgpt.flower.deploy.certificates import pem
from fedgpt.flower.deploy.documents import as_text, document, path_of, written
from fedgpt.flower.deploy.folder import SITES, ca_of, changing, checked_folder, read_server
from fedgpt.flower.deploy.kit import NAME, Request, approved, read_kit, read_request

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
__all__ = ["all_sites", "approve", "read_kit", "read_server", "renew_site", "revoke", "sites"]


@dataclass(frozen=True)
class Site:
    """A site in the list: its public key (PEM), when it was approved and revoked, and the
    fingerprints of the keys that it had before.
    """

    public_key: str
    fingerprint: str
    approved: str
    revoked: str | None = None
    replaced: tuple[str, ...] = ()


class Issued(NamedTuple):
    """An approval that was written, the site as it is in the list now, and as it was before."""

    path: Path
    site: Site
    before: Site | None
    ca_fingerprint: str


def sites(folder: str | Path) -> dict[str, bytes]:
    """Name -> public key, as Flower has it (PEM), of each site that is approved and not revoked.

    Raises FedGPTError as `read_server` does.
    """
    known = all_sites(folder)
    return {name: site.public_key.encode() for name, site in known.items() if not site.revoked}


def all_sites(folder: str | Path) -> dict[str, Site]:
    """Name -> site, for every site that was ever approved; raises FedGPTError as `sites` does."""
    path = checked_folder(folder) / SITES
    found: dict[str, Site] = {}
    taken: set[str] = set()
    for name, record in document(path, "sites")["sites"].items():
        site = _site(name, record, f"{path}: {name[:80]!r}")
        if taken & (own := {name.casefold(), site.fingerprint, *site.replaced}):
            raise FedGPTError(f"{path} is damaged: {name!r} has the name or a key of another site")
        taken |= own
        found[name] = site
    return found


def approve(folder: str | Path, request: str | Path, out: str | Path = ".") -> Issued:
    """Put a site that is new into the list, and write NAME.approval into the folder `out`.

    Raises ConfigError if the name or the key is known.
    """
    wish = read_request(request)
    with _changing(folder) as known:
        for name, site in known.items():
            # names are compared as files are on some systems: A.kit and a.kit may be one
            same_name = name.casefold() == wish.name.casefold()
            if same_name or _had(site, wish):
                if _had(site, wish) and (site.revoked or site.fingerprint != wish.fingerprint):
                    raise _gone(request, name, site, wish)
                again = shlex.join(["fedgpt", "keys", "renew", str(folder), str(request)])
                raise ConfigError(
                    f"{request}: the site {name}, approved at {site.approved}{_until(site)}, has"
                    f" this {'name' if same_name else 'key'}; a site that is known gets a new key,"
                    f" or its approval once more, with: {again}"
                )
        return _issue(known, wish, _new(wish), (folder, out))


def renew_site(folder: str | Path, request: str | Path, out: str | Path = ".") -> Issued:
    """Let the new key of a site take the place of its old one at once, also if that was revoked.

    For the key that the site has, only its approval is written once more. Raises ConfigError if the
    name is unknown, or if the key was revoked or replaced or is that of another site.
    """
    wish = read_request(request)
    with _changing(folder) as known:
        site = _known(known, wish.name, str(request))
        if site.fingerprint == wish.fingerprint and not site.revoked:
            return _issue(known, wish, site, (folder, out))
        if had := [name for name, other in known.items() if _had(other, wish)]:
            raise _gone(request, had[0], known[had[0]], wish)
        new = replace(_new(wish), replaced=(*site.replaced, site.fingerprint))
        return _issue(known, wish, new, (folder, out))


def revoke(folder: str | Path, name: str) -> Site:
    """Mark a site as revoked; raises ConfigError if it is unknown or revoked already."""
    with _changing(folder) as known:
        site = _known(known, name, str(name))
        if site.revoked:
            raise ConfigError(f"{name}: was revoked already, at {site.revoked}")
        known[name] = replace(site, revoked=documents.now())
    return known[name]


@contextmanager
def _changing(folder: str | Path) -> Iterator[dict[str, Site]]:
    """The list of sites, for the block to change; it is written if the block succeeds."""
    path = checked_folder(folder)
    with changing(path):
        known = all_sites(path)
        yield known
        records = {name: _record(site) for name, site in known.items()}
        write_text(path / SITES, as_text(written("sites", {"sites": records})), mode=PRIVATE)


def _record(site: Site) -> dict[str, Any]:
    record = {"public_key": site.public_key, "approved": site.approved, "revoked": site.revoked}
    return record | ({"replaced": list(site.replaced)} if site.replaced else {})


def _site(name: str, record: Any, where: str) -> Site:
    fields = {"public_key", "approved", "revoked"}
    if type(record) is not dict or {*record} - {"replaced"} != fields or not NAME.fullmatch(name):
        raise FedGPTError(f"{where} is damaged: a site has the fields {', '.join(sorted(fields))}")
    replaced = record.get("replaced", [])
    if type(record["public_key"]) is not str or type(replaced) is not list:
        raise FedGPTError(f"{where} is damaged: a key has a value of the wrong type")
    if not all(type(one) is str and FINGERPRINT.fullmatch(one) for one in replaced):
        raise FedGPTError(f"{where} is damaged: a replaced key is not a fingerprint")
    for time in (record["approved"], *[record["revoked"]] * (record["revoked"] is not None)):
        documents.check_time(time, where)
    key = documents.public_key(record["public_key"], where)
    return Site(
        documents.public_text(key),
        documents.fingerprint(key),
        record["approved"],
        record["revoked"],
        tuple(replaced),
    )


def _new(wish: Request) -> Site:
    return Site(wish.public_key, wish.fingerprint, documents.now())


def _gone(request: str | Path, name: str, site: Site, wish: Request) -> ConfigError:
    return ConfigError(
        f"{request}: this key is or was that of the site {name}, approved at"
        f" {site.approved}{_until(site)}, and cannot come back; the site makes a new one with:"
        f" fedgpt keys request {wish.name}"
    )


def _until(site: Site) -> str:
    return f" and revoked at {site.revoked}" if site.revoked else ""


def _had(site: Site, wish: Request) -> bool:
    return wish.fingerprint in (site.fingerprint, *site.replaced)


def _known(known: dict[str, Site], name: str, typed: str) -> Site:
    if name not in known:
        raise ConfigError(f"{typed}: there is no site {name!r}{nearest(name, known)}")
    return known[name]


def _issue(
    known: dict[str, Site], wish: Request, site: Site, places: tuple[str | Path, str | Path]
) -> Issued:
    """Write NAME.approval from a server's folder into another, and enter the site into `known`.

    The list is written after the approval, so that the same command works again after any failure.
    """
    folder, out = places
    server = read_server(folder)
    ca, ca_key = ca_of(server.folder)
    path = path_of(out) / f"{wish.name}.approval"
    content = approved(wish, server.hosts, server.port, pem(ca), ca_key)
    try:
        if not path.parent.is_dir():
            raise ConfigError(f"--out {out}: is not a folder; name one that exists")
        write_text(path, as_text(content))
    except OSError as error:
        raise FedGPTError(f"{path} cannot be written: {error.strerror}") from None
    issued = Issued(path, site, known.get(wish.name), server.ca_fingerprint)
    known[wish.name] = site
    return issued
