"""`fedgpt keys`: the keys of a server and of its sites."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedgpt.flower.deploy.folder import Server
    from fedgpt.flower.deploy.keys import Issued


def main(arguments: list[str]) -> int:
    """Carry out one of the commands, and print what the user has to know or to do next."""
    chosen = parser().parse_args(arguments)
    print("\n".join(ACTIONS[chosen.command](chosen)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    top = argparse.ArgumentParser(
        "fedgpt keys",
        description="Keys of a deployment: the server's folder, and a kit for each site.",
        epilog="fedgpt keys COMMAND --help explains a command; docs/deploy.md explains all.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, *words: str, help: str) -> argparse.ArgumentParser:
        text = f"{help[0].upper()}{help[1:]}."
        one = commands.add_parser(name, help=help, description=" ".join([text, *words]))
        if name != "request":
            one.add_argument("folder", metavar="DIR", help="the server's folder")
        return one

    init = command(
        "init", "It has the CA, which must be kept safe.", help="make the folder of a server"
    )
    init.add_argument(
        "--host",
        metavar="NAME",
        action="append",
        default=[],
        help="host name or IP address by which sites reach the server; may be given several times",
    )
    init.add_argument("--port", type=int, default=9443, help="port of the server (%(default)s)")
    request = command(
        "request",
        "Writes NAME.kit, which stays at the site, and NAME.request, for the server's operator.",
        help="make a site's key, at the site",
    )
    request.add_argument("name", metavar="NAME", help="name of the site")
    request.add_argument(
        "--dir", metavar="FOLDER", default=".", help="where the two files are written (here)"
    )
    approve = command(
        "approve",
        "Writes NAME.approval, for the site.",
        help="approve the request of a new site",
    )
    approve.add_argument("request", metavar="FILE.request", help="what the site has sent")
    revoke = command("revoke", help="shut a site out")
    revoke.add_argument("name", metavar="NAME", help="name of the site")
    renew = command(
        "renew",
        "Without FILE.request the server gets a new certificate, and sites need nothing new. With"
        " it the site's new key takes the place of the one that it had.",
        help="renew the server's certificate, or a site's key",
    )
    renew.add_argument(
        "request", metavar="FILE.request", nargs="?", help="a request with the site's new key"
    )
    for one in (approve, renew):
        one.add_argument(
            "--out", metavar="FOLDER", default=".", help="where NAME.approval is written (here)"
        )
    command("list", help="show the sites and the certificate")
    return top


def _init(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.folder import init

    server = init(chosen.folder, chosen.host, chosen.port)
    yield f"{server.folder} is the folder of a server; keep it secret, and make a backup of it"
    yield from _certificates(server)
    yield "each site now types: fedgpt keys request NAME"


def _request(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.kit import make_request

    made = make_request(chosen.name, chosen.dir)
    yield f"{made.name}.kit has the private key of this site; it stays here"
    yield f"{made.name}.request is for the operator of the server, who approves it"
    yield f"key          {made.fingerprint}"


def _approve(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.keys import approve

    yield from _issued(approve(chosen.folder, chosen.request, chosen.out))


def _revoke(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.keys import revoke

    site = revoke(chosen.folder, chosen.name)
    yield f"{chosen.name} is revoked: its key {site.fingerprint} is refused from now on"


def _renew(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.folder import renew
    from fedgpt.flower.deploy.keys import renew_site

    if chosen.request is not None:
        yield from _issued(renew_site(chosen.folder, chosen.request, chosen.out))
        return
    yield from _certificates(renew(chosen.folder))
    yield "a server that runs takes it at once; sites need nothing new"


def _issued(issued: Issued) -> Iterator[str]:
    name, before, site = issued.path.stem, issued.before, issued.site
    if before is None:
        yield f"{name} is approved"
    elif before.fingerprint == site.fingerprint:
        yield f"{name} has this key already; its approval is written once more"
    elif before.revoked:
        yield f"{name} was revoked at {before.revoked}; with its new key it is approved again"
    else:
        yield f"{name} has a new key; its old one {before.fingerprint} is refused from now on"
    yield f"key          {site.fingerprint}"
    yield f"CA           {issued.ca_fingerprint}"
    yield "compare both by telephone with what the site sees: the key now, the CA when it connects"
    yield f"{issued.path} goes back to the site, into the folder of its kit"


def _list(chosen: argparse.Namespace) -> Iterator[str]:
    from fedgpt.flower.deploy.keys import all_sites, read_server

    server = read_server(chosen.folder)
    yield from _certificates(server)
    known = all_sites(chosen.folder)
    rows = [("site", "key", "approved", "revoked")]
    rows += [
        (name, site.fingerprint, site.approved, site.revoked or "-") for name, site in known.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield ""
    for row in rows if known else []:
        yield "  ".join(
            f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)
        ).rstrip()
    if not known:
        yield "no site is approved yet"


def _certificates(server: Server) -> Iterator[str]:
    yield f"certificate  until {server.expires:%Y-%m-%d}, for {', '.join(server.certified)}"
    yield f"CA           until {server.ca_expires:%Y-%m-%d}, {server.ca_fingerprint}"
    if server.warning:
        yield f"warning      {server.warning}"


ACTIONS = {
    **{"init": _init, "request": _request, "approve": _approve},
    **{"revoke": _revoke, "renew": _renew, "list": _list},
}
