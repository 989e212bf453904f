"""A server's folder and the kits of its sites, made as an operator and the sites make them."""

from __future__ import annotations

from pathlib import Path

from fedgpt.flower.deploy.folder import Server, init
from fedgpt.flower.deploy.keys import approve
from fedgpt.flower.deploy.kit import make_request

HOSTS = ("fed.example.org", "10.0.0.5", "2001:db8::7")


def deployment(folder: Path, *names: str) -> Server:
    """`folder`/server, and for each name a kit with its approval beside it in `folder`."""
    server = init(folder / "server", HOSTS)
    for name in names:
        make_request(name, folder)
        approve(server.folder, folder / f"{name}.request", folder)
    return server
