"""`fedgpt server`: a server for real clients."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedgpt.flower.deploy.link_process import LinkProcess
    from fedgpt.flower.deploy.queue import Wish


def main(arguments: list[str]) -> int:
    """Run one run to its end, or those of the queue until SIGTERM."""
    chosen = parser().parse_intermixed_args(arguments)

    from fedgpt.cli.words import server_run
    from fedgpt.flower.deploy import audit, queue
    from fedgpt.flower.deploy.folder import checked_host, checked_reply_objects, read_server
    from fedgpt.flower.deploy.link_process import LinkProcess
    from fedgpt.flower.deploy.monitor import checked_port, monitored
    from fedgpt.flower.deploy.supervise import serving

    server = read_server(chosen.folder)
    folder, port = server.folder.absolute(), checked_port(chosen.status_port)
    host = checked_host(chosen.host, chosen.insecure)
    arguments = [f"--host={host}"] if host else []
    if chosen.reply_objects is not None:
        arguments.append(f"--reply-objects={checked_reply_objects(chosen.reply_objects)}")
    link = LinkProcess(folder, [*arguments, *["--insecure"] * chosen.insecure])
    wish = server_run(chosen.options, chosen.config_dir, folder) if chosen.options else None
    if chosen.print:
        print("\n".join(_would_start(link, wish, port)))
        return 0
    if server.warning:
        print(f"fedgpt: warning: {server.warning}", file=sys.stderr)
    if chosen.insecure:
        print(
            f"fedgpt: --insecure: NO ENCRYPTION; only this machine's clients can connect ({host})",
            file=sys.stderr,
        )
    with serving(folder, link) as supervisor, monitored(folder, port):
        if wish is None:
            supervisor.serve()
            return 0
        run = queue.add(folder, wish, once=True)
        audit.note(folder, "submit", run=run.number, name=run.name)
        supervisor.carry_out(run)
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    one = argparse.ArgumentParser(
        "fedgpt server",
        description="Take real clients. With OPTIONS, those of fedgpt run, it brings this one run"
        " to its end and returns its exit code; without, it takes the runs of fedgpt submit, one at"
        " a time, until SIGTERM. A run goes on after any crash.",
        epilog="docs/deploy.md explains a deployment.",
    )
    one.add_argument("folder", metavar="DIR", help="the server's folder (fedgpt keys init DIR)")
    one.add_argument("options", metavar="OPTIONS", nargs="*", help="options of one run")
    one.add_argument("--host", help="listen on this address only, such as behind a proxy")
    one.add_argument(
        "--insecure", action="store_true", help="without TLS, for clients on this machine only"
    )
    one.add_argument(
        "--reply-objects",
        metavar="N",
        type=int,
        help="most objects (of 5 MiB) of a client's reply (256)",
    )
    one.add_argument(
        "--status-port",
        metavar="PORT",
        type=int,
        default=9444,
        help="loopback port of /health and /metrics; 0 for none (%(default)s)",
    )
    one.add_argument(
        "--print", action="store_true", help="print what would be started, and start nothing"
    )
    one.add_argument("--config-dir", metavar="FOLDER", help="choices of your own, as in fedgpt run")
    return one


def _would_start(link: LinkProcess, wish: Wish | None, port: int) -> Iterator[str]:
    settings = [f"{name}={shlex.quote(value)}" for name, value in link.environment.items()]
    yield " \\\n    ".join([*settings, shlex.join(link.command)])
    if port:
        yield f"http://127.0.0.1:{port}/health and /metrics"
    if wish is not None:
        yield f"a run of {wish.options.rounds} versions in {wish.options.run_dir}"
