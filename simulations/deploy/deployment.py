"""A deployment on this machine: a server and three sites, each a process of its own.

The sites have the State of the Union addresses of one president each. The server has the addresses
of two others: its public and its held-out text.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import Popen

from fedgpt.core.options import CorpusOptions
from fedgpt.data.corpus import corpus_of, read_documents

SITES = {"north": "Ulysses S. Grant", "south": "Grover Cleveland", "west": "Andrew Jackson"}
SERVER = {"public": "Theodore Roosevelt", "held_out": "James Monroe"}
STOP_SECONDS = 60.0  # for a process to end after SIGTERM


class Deployment:
    """A server's folder and three sites below one folder, and the processes that run now."""

    def __init__(self, folder: Path, say: bool = True):
        """With `say` each command is printed before it is run."""
        self.folder, self._say = folder.absolute(), say
        self.server, self.port = self.folder / "server", free_port()
        self.processes: dict[str, Popen[bytes]] = {}
        # name of a process -> how a command is started in its network, if that is not this one
        self.inside: dict[str, Callable[..., list[str]]] = {}
        (self.folder / "logs").mkdir(parents=True)

    def write_texts(self) -> None:
        """Write each party's text to a folder of its own."""
        names = {**{president: site for site, president in SITES.items()}}
        names |= {president: part for part, president in SERVER.items()}
        for document in read_documents(corpus_of(CorpusOptions(name="sotu", client="president"))):
            if document.client in names:
                folder = self.text(names[document.client])
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{document.id}.txt").write_text(document.text, encoding="utf-8")

    def text(self, party: str) -> Path:
        """The folder with the text of a site, or of the server's part."""
        return self.folder / ("texts" if party in SITES else "server-texts") / party

    def make_keys(self, *hosts: str) -> None:
        """Keys of the server and the sites: each site makes its own, and the server approves it.

        Sites reach the server as localhost, or else by one of the other `hosts`.
        """
        named = [word for host in ("localhost", *hosts) for word in ("--host", host)]
        self.command("keys", "init", "server", *named, "--port", str(self.port))
        for site in SITES:
            self.command("keys", "request", site)
            self.command("keys", "approve", "server", f"{site}.request")

    def start_client(self, site: str) -> Popen[bytes]:
        """Start the client of a site, or start it again."""
        return self.start(site, "client", *self.site_words(site))

    def site_words(self, site: str) -> list[str]:
        """The kit, the text and the folders of a site, as they are typed."""
        folders = ["--state", f"state/{site}", "--cache", f"cache/{site}"]
        text = str(self.text(site).relative_to(self.folder))
        return [f"{site}.kit", "--text", text, *folders]

    def start_server(self, *options: str) -> Popen[bytes]:
        """Start the server with a run, or with none."""
        return self.start("server", "server", "server", "--status-port", "0", *options)

    def run_options(self, *more: str) -> list[str]:
        """The options of a run whose clients have their own text."""
        own = [f"corpus.{part}_path={self.text(part)}" for part in SERVER]
        return ["corpus=site", f"pace.begin={len(SITES)}", *own, *more]

    def command(self, *words: str) -> str:
        """Run a command of fedgpt to its end; returns what it prints."""
        self._tell(words)
        done = subprocess.run(
            [sys.executable, "-m", "fedgpt", *words],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"fedgpt {shlex.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def start(self, name: str, *words: str) -> Popen[bytes]:
        """Start a command of fedgpt, which writes to logs/NAME.log."""
        self._tell((*words, "&"))
        return self.start_program(name, "-m", "fedgpt", *words)

    def start_program(self, name: str, *words: str) -> Popen[bytes]:
        """Start Python with some arguments, in the network of `name` if it has one of its own."""
        inside = self.inside.get(name, lambda *command: list(command))
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            process = Popen(
                inside(sys.executable, *words),
                cwd=self.folder,
                env=environment(),
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / "logs" / f"{name}.log").read_text(encoding="utf-8")

    def pids(self, program: str) -> list[int]:
        """The processes of the server that run a program or a module."""
        mine, found = str(self.server).encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                words = (path / "cmdline").read_bytes().split(b"\0")[:4]
                if any(word.endswith(program.encode()) for word in words) and (
                    mine in (path / "environ").read_bytes()
                ):
                    found.append(int(path.name))
        return found

    def run_folder(self) -> Path:
        """The folder of the newest run."""
        return max((self.server / "runs").iterdir())

    def stop(self, name: str, by: int = signal.SIGTERM) -> int:
        """Stop a process by a signal; returns its exit code."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(by)
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise

    def _tell(self, words: tuple[str, ...]) -> None:
        if self._say:
            print(f"$ fedgpt {' '.join(words)}", flush=True)


@contextmanager
def deployment(folder: Path, say: bool = True) -> Iterator[Deployment]:
    """A deployment in a new folder; all its processes end with the block."""
    one = Deployment(folder, say)
    try:
        yield one
    finally:
        with ExitStack() as ends:  # one that does not end keeps no other from its end
            for name in list(one.processes):
                ends.callback(one.stop, name)


def environment() -> Mapping[str, str]:
    """The environment of all processes: each computes with one thread, as they share a machine."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition: object, seconds: float, what: str) -> None:
    """Wait until `condition()` holds; raises TimeoutError with `what` if it does not in time."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.2)
