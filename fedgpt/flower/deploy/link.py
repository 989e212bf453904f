"""The server's link: Flower's SuperLink behind its guard, in one process with three listeners.

    python -m fedgpt.flower.deploy.link DIR

| listener | who | what |
|---|---|---|
| the port in DIR/server.json, TLS | everybody | the guard: ten fleet paths, approved sites |
| a loopback port | this user's processes | /v1/runtime/, with Flower's secret or a task's token |
| DIR/control.sock | this user | /v1/control/ and /health |

Nothing depends on the address of a peer: behind a proxy on this machine all have the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import shlex
import signal
import ssl
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from flwr.server.superlink.linkstate import LinkState
from uvicorn.loops.auto import auto_loop_factory

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.files import PRIVATE, read_json, write_text
from fedgpt.flower.deploy import inner
from fedgpt.flower.deploy.folder import REPLY_OBJECTS, SITES, checked_host, checked_reply_objects
from fedgpt.flower.deploy.guard import Guard
from fedgpt.flower.deploy.keys import sites as approved_sites
from fedgpt.flower.deploy.limits import Record
from fedgpt.flower.deploy.listener import Listener
from fedgpt.flower.deploy.registration import register, stop_old_runs
from fedgpt.flower.deploy.waiting import Bell
from fedgpt.flower.nodes import NODES_FILE

POLL_SECONDS = 1.0  # between two looks at the list of sites, the certificate and the child
AUDIT_BYTES, AUDIT_FILES = 16 << 20, 3  # size of audit.jsonl, and how many older ones are kept
CERTIFICATE, KEY = "server.pem", "server.key"
NODES = "nodes.json"  # node id -> its site
LOCK_SECONDS = 30.0  # for the link of a server that was just killed to end
_SECRET_BYTES = 32
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """A server's folder, where it listens, and the most objects of a reply."""

    folder: Path
    host: str | None  # None: all addresses of this machine
    port: int
    reply_objects: int
    insecure: bool = False  # without TLS

    @property
    def files(self) -> tuple[Path, Path] | None:
        """The certificate and its key, if there is TLS."""
        return None if self.insecure else (self.folder / CERTIFICATE, self.folder / KEY)


class Sites:
    """The sites that are approved now: those of the list, and the nodes of the link state."""

    def __init__(self, folder: Path, state: LinkState):
        self.folder, self._state = folder, state
        self.keys = approved_sites(folder)
        self._register()

    def reload(self) -> None:
        """Take over a changed list; a damaged one changes nothing and is logged."""
        try:
            self.keys = approved_sites(self.folder)  # from here on a revoked site is refused
        except FedGPTError as damage:
            _LOG.error("%s; the sites stay as they were", damage)
            return
        self._register()

    def _register(self) -> None:
        """Register the sites, and write down which node is whose, for the ServerApp."""
        nodes = register(self._state, self.keys)
        named = {str(node): name for name, node in nodes.items()}
        write_text(self.folder / NODES, json.dumps(named) + "\n", mode=PRIVATE)


async def serve(settings: Settings) -> None:
    """Run the link until SIGTERM or SIGINT; raises FedGPTError where it cannot go on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    folder, secret = settings.folder, secrets.token_bytes(_SECRET_BYTES)
    os.environ[NODES_FILE] = str(folder / NODES)
    # before the files are read, so that no change is missed
    list_changed, files_changed = _watch(folder / SITES), _watch(*settings.files or ())
    bell = Bell()
    app = inner.flower_app(folder, secret, bell)
    link_state = app.state.linkstate_factory.state()
    stop_old_runs(link_state)
    sites = Sites(folder, link_state)
    async with AsyncExitStack() as stack:
        record = Record(stack.enter_context(_audit(folder)))
        messages = inner.without_control(app)
        guard = Guard(messages, lambda: sites.keys, record, settings.reply_objects, bell)
        state = dict(await stack.enter_async_context(app.router.lifespan_context(app)) or {})
        listener = _new_listener(guard, settings.files, state)
        # first: whoever is answered on the control socket may rely on the port
        await stack.enter_async_context(_listening(listener, settings))
        runtime = inner.runtime_socket()
        control = inner.control_socket(folder / inner.CONTROL_SOCKET)
        stack.callback((folder / inner.CONTROL_SOCKET).unlink, missing_ok=True)
        for served, one in (
            (inner.Only(messages, inner.RUNTIME, bell), runtime),
            (inner.Only(app, inner.CONTROL), control),
        ):
            await stack.enter_async_context(inner.served(served, one, state))
        port = runtime.getsockname()[1]
        starter = await stack.enter_async_context(inner.superexec(folder, port, secret))
        where = f"port {listener.port}{' without TLS' if settings.insecure else ''}"
        print(f"link: {where}, {len(sites.keys)} approved sites", flush=True)
        while not stop.is_set():
            await _wait(stop)
            listener.check()
            if starter.poll() is not None:
                raise FedGPTError(f"flower-superexec ended with exit code {starter.returncode}")
            if list_changed():
                await asyncio.to_thread(sites.reload)
            if files_changed():
                _renew(listener)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the link of a server's folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedgpt.flower.deploy.link")
    parser.add_argument("folder", metavar="DIR", help="a server's folder (fedgpt keys init DIR)")
    parser.add_argument("--host", help="listen on this address only, such as behind a proxy")
    parser.add_argument(
        "--reply-objects",
        type=int,
        default=REPLY_OBJECTS,
        help=f"most objects (5 MiB) of a client's reply (default {REPLY_OBJECTS})",
    )
    parser.add_argument("--insecure", action="store_true", help="without TLS, on loopback only")
    given = parser.parse_args(arguments)
    try:
        settings = checked_settings(given)
        with (
            FileLock(settings.folder / "link.lock", timeout=LOCK_SECONDS),
            # uvloop's loop where there is one: a message's way then takes far less time here
            asyncio.Runner(loop_factory=auto_loop_factory()) as runner,
        ):
            runner.run(serve(settings))
    except Timeout:
        print(f"fedgpt: another link runs in {given.folder}", file=sys.stderr)
        return 1
    except FedGPTError as error:
        print(f"fedgpt: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def checked_settings(given: argparse.Namespace) -> Settings:
    """The settings of a server's folder; raises ConfigError, FedGPTError."""
    folder = Path(given.folder)
    host = checked_host(given.host, given.insecure)
    if not folder.is_dir():
        typed = shlex.quote(str(folder))
        raise ConfigError(
            f"DIR={folder}: no such folder; make one with: fedgpt keys init {typed} --host NAME"
        )
    folder = folder.absolute()
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise ConfigError(f"DIR={folder}: other users may open it; allow only yours: chmod 700")
    port = read_json(folder / "server.json").get("port")
    if not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise FedGPTError(f"{folder / 'server.json'}: port={port!r}, must be from 1 to 65535")
    objects = checked_reply_objects(given.reply_objects)
    return Settings(folder, host, port, objects, given.insecure)


@asynccontextmanager
async def _listening(listener: Listener, settings: Settings) -> AsyncIterator[None]:
    try:
        await listener.start(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host or 'all addresses'}, port {settings.port}"
        raise FedGPTError(f"cannot listen on {where}: {error.strerror}") from None
    try:
        yield
    finally:
        await listener.stop()


@contextmanager
def _audit(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A writer of audit.jsonl; older lines move to audit.jsonl.1 and so on, and then go."""
    handler = RotatingFileHandler(
        folder / "audit.jsonl", maxBytes=AUDIT_BYTES, backupCount=AUDIT_FILES, encoding="utf-8"
    )

    def write(line: dict[str, Any]) -> None:
        handler.handle(logging.makeLogRecord({"msg": "%s", "args": (json.dumps(line),)}))

    with closing(handler):
        yield write


def _watch(*files: Path) -> Callable[[], bool]:
    """A function that tells whether one of the files was replaced since it was last called."""

    def state() -> list[tuple[int, int]]:
        found = [path.stat() for path in files if path.exists()]
        return [(one.st_mtime_ns, one.st_ino) for one in found]

    last = state()

    def changed() -> bool:
        nonlocal last
        before, last = last, state()
        return last != before

    return changed


def _new_listener(guard: Guard, files: tuple[Path, Path] | None, state: dict[str, Any]) -> Listener:
    if files is None:
        return Listener(guard, None, state)
    try:
        return Listener(guard, (str(files[0]), str(files[1])), state)
    except OSError as error:
        raise FedGPTError(f"{files[0]} and {files[1].name} cannot be used: {error}") from None


def _renew(listener: Listener) -> None:
    try:
        listener.load_certificate()
    except (ssl.SSLError, OSError) as error:
        _LOG.error("the new certificate cannot be used: %s; the old one stays", error)


async def _wait(stop: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(POLL_SECONDS):
            await stop.wait()
    except TimeoutError:
        pass


if __name__ == "__main__":
    sys.exit(main())
