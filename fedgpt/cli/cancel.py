"""`fedgpt cancel`: end a run of a server, or take it from the queue."""

from __future__ import annotations

import argparse


def main(arguments: list[str]) -> int:
    """Ask the server to end a run; says what happens to it."""
    chosen = parser().parse_args(arguments)

    from fedgpt.core.errors import ConfigError
    from fedgpt.flower.deploy import audit, queue
    from fedgpt.flower.deploy.folder import checked_folder
    from fedgpt.flower.deploy.supervise import is_served

    folder = checked_folder(chosen.folder).absolute()
    runs = {run.number: run for run in queue.runs(folder)}
    if chosen.run is not None and chosen.run not in runs:
        there = ", ".join(map(str, runs)) or "none"
        raise ConfigError(f"RUN={chosen.run}: {folder} has no such run; there are {there}")
    under_way = (run.number for run in runs.values() if run.running)
    number = next(under_way, None) if chosen.run is None else chosen.run
    if number is None:
        waiting = ", ".join(str(run.number) for run in runs.values() if run.waits)
        advice = f"; name one of the queue: {waiting}" if waiting else ", and none waits"
        raise ConfigError(f"no run is under way in {folder}{advice}")
    run = runs[number]
    queue.cancel(folder, run)
    audit.note(folder, "cancel", run=number, name=run.name)
    # a complete one may still be handing its model to the sites
    stops = "stops, with a checkpoint if it has begun, unless it is complete already"
    ends = stops if is_served(folder) else "is not continued"
    print(f"{run.name} (run {number}) {'will not begin' if run.waits else ends}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    one = argparse.ArgumentParser(
        "fedgpt cancel",
        description="End the run of a server, with a checkpoint, so that the next one of the queue"
        " begins; or let a run of the queue not begin. fedgpt status shows when it has ended, and"
        " with which command a run that had begun can be continued. No server needs to run.",
    )
    one.add_argument("folder", metavar="DIR", help="the server's folder")
    one.add_argument(
        "run", metavar="RUN", nargs="?", type=int, help="its number; without, the run under way"
    )
    return one
