"""`fedgpt submit`: a run for the queue of a server."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

POLL_SECONDS = 0.5


def main(arguments: list[str]) -> int:
    """Check the options, queue the run and print its number; follow it if asked to."""
    chosen = parser().parse_intermixed_args(arguments)

    from fedgpt.cli.words import server_run
    from fedgpt.config.compose import to_yaml
    from fedgpt.flower.deploy import audit, queue
    from fedgpt.flower.deploy.folder import checked_folder
    from fedgpt.flower.deploy.supervise import is_served

    folder = checked_folder(chosen.folder).absolute()
    wish = server_run(chosen.options, chosen.config_dir, folder)
    if chosen.print:
        print(to_yaml(wish.options), end="")
        return 0
    run = queue.add(folder, wish)
    audit.note(folder, "submit", run=run.number, name=run.name)
    print(f"run {run.number}", flush=True)
    if not is_served(folder):
        print(
            f"fedgpt: no server runs in {folder}; the run waits until one does: fedgpt server"
            f" {chosen.folder}",
            file=sys.stderr,
        )
    return follow(folder, run.number) if chosen.wait else 0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    one = argparse.ArgumentParser(
        "fedgpt submit",
        description="Queue a run, with the options of fedgpt run, at the server of a folder. Runs"
        " are carried out in their order, one at a time.",
    )
    one.add_argument("folder", metavar="DIR", help="the server's folder")
    one.add_argument("options", metavar="OPTIONS", nargs="*", help="options of the run")
    one.add_argument(
        "--wait", action="store_true", help="print its progress, and return its exit code"
    )
    one.add_argument("--print", action="store_true", help="print its options, and queue nothing")
    one.add_argument("--config-dir", metavar="FOLDER", help="choices of your own, as in fedgpt run")
    return one


def follow(folder: Path, number: int) -> int:
    """Print each new version of a run until it ends; returns its exit code."""
    from fedgpt.config.compose import from_yaml
    from fedgpt.flower.deploy import queue
    from fedgpt.report.progress import ProgressDisplay
    from fedgpt.storage.run_folder import read_lines

    display = ProgressDisplay(from_yaml(queue.read(folder, number).config, reading=True))
    printed = -1
    while True:
        run = queue.read(folder, number)  # before its versions, so that none is left out
        if not run.dated:
            for line in read_lines(Path(run.run_dir) / "metrics.jsonl", "version"):
                if line["version"] > printed:
                    printed = line["version"]
                    display.say(display.line(line))
        if run.exit_code is not None:
            if run.reason:
                print(f"fedgpt: {run.reason}", file=sys.stderr)
            return run.exit_code
        try:
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            print(f"fedgpt: the server goes on with run {number}", file=sys.stderr)
            raise
