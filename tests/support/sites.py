"""Sites with their own text, a server with the rest, and the same text in one place."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from support.superlink import LiveSuperLink, persistent_node

from fedgpt.api import run

NAMES = ("ann", "bob", "eve")
SMALL = [
    "model.n_layer=1",
    "model.n_embd=16",
    "model.n_head=2",
    "model.block_size=16",
    "local.batch_size=2",
    "local.steps=2",
    "rounds=3",
    "pace.clients=0",
    "evaluate.tokens=1024",
    "evaluate.samples=0",
    "runtime.threads=1",
]


def write_text(folder: Path, writer: str, pages: int, first: int = 0) -> None:
    """A folder with some pages of a writer."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in range(first, first + pages):
        lines = [f"{writer} saw {page + n} herons by the river, and {n} boats." for n in range(8)]
        (folder / f"{page:02d}.txt").write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Texts:
    """The text of three sites and of the server below one folder."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Texts:
        """Texts of different lengths."""
        for number, name in enumerate(NAMES):
            write_text(folder / "sites" / name, name, 4 + 2 * number)
        write_text(folder / "public", "the public writer", 4)
        write_text(folder / "held_out", "the held-out writer", 3)
        return cls(folder)

    def of(self, name: str) -> Path:
        """The folder of a site."""
        return self.folder / "sites" / name

    @property
    def own(self) -> list[str]:
        """The options of the server's own text, and of the shape of the run."""
        return [
            f"corpus.public_path={self.folder / 'public'}",
            f"corpus.held_out_path={self.folder / 'held_out'}",
            "tokenizer.vocab_size=300",
            *SMALL,
        ]

    def at_sites(self, *more: str) -> list[str]:
        """The options of a run in which each site has its text."""
        return ["corpus=site", "pace.begin=3", *self.own, *more]

    def in_one_place(self, *more: str) -> dict[str, Any]:
        """The summary of a run on the same text with simulated clients."""
        corpus = ["corpus=files", "corpus.client=folder", f"corpus.path={self.folder / 'sites'}"]
        return run(*corpus, *self.own, *more).summary

    def config(self, name: str) -> dict[str, str]:
        """The node configuration of a site."""
        state = self.folder / "state" / name
        return {"name": name, "text": str(self.of(name)), "state-dir": str(state)}


def start_site(
    nodes: ExitStack, link: LiveSuperLink, texts: Texts, name: str, **config: str
) -> Popen[str]:
    """A process with a persistent client that has the text of a site."""
    key = ec.generate_private_key(ec.SECP384R1())
    about = {**texts.config(name), **config}
    app = "fedgpt.flower.client_app:app"
    return nodes.enter_context(persistent_node(link, key, app, about))
