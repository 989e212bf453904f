"""`fedgpt status`: a server, its run and its queue."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedgpt.flower.deploy.queue import QueuedRun
    from fedgpt.flower.deploy.status import Status

COLUMN = 10  # where what is told begins


def main(arguments: list[str]) -> int:
    """Print the status as text or JSON."""
    chosen = parser().parse_args(arguments)

    from fedgpt.flower.deploy.folder import checked_folder
    from fedgpt.flower.deploy.status import status_of

    status = status_of(checked_folder(chosen.folder).absolute())
    print(json.dumps(status.as_json(), indent=1) if chosen.json else "\n".join(_lines(status)))
    return 0


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    one = argparse.ArgumentParser(
        "fedgpt status",
        description="Show whether a server runs, its clients, its run, its queue, and how earlier"
        " runs ended. It needs nothing but the server's folder.",
    )
    one.add_argument("folder", metavar="DIR", help="the server's folder")
    one.add_argument("--json", action="store_true", help="print JSON")
    return one


def _lines(status: Status) -> Iterator[str]:
    yield _row("server", "runs" if status.serves else "not running")
    yield _row("link", "answers" if status.link else "does not answer")
    offline = [name for name in status.approved if name not in status.online]
    yield _row("online", ", ".join(status.online) or "none")
    yield _row("offline", ", ".join(offline) or "none")
    if run := status.running:
        state = " (is cancelled)" if run.number in status.cancelled else ""
        state += "" if status.serves else " (waits for a server)"
        yield _row("run", f"{_named(run)}: {_progress(run)}{state}")
        yield _row("", run.run_dir)
    for run in status.waiting:
        state = " (is cancelled)" if run.number in status.cancelled else ""
        yield _row("queue", f"{_named(run)}, submitted {run.submitted}{state}")
    for run in status.ended:
        how = "complete" if run.exit_code == 0 else f"exit code {run.exit_code}: {run.reason}"
        yield _row("ended", f"{_named(run)}: {_progress(run)}, {how}")


def _named(run: QueuedRun) -> str:
    return f"{run.number} ({run.name})"


def _progress(run: QueuedRun) -> str:
    from fedgpt.flower.deploy.status import progress_of
    from fedgpt.report.scores import named, shown

    progress = progress_of(run)
    if progress.version is None:
        return "no version yet"
    of = f"/{run.versions}" if run.versions else ""
    parts = [f"version {progress.version}{of}"]
    score = shown(progress.scores) or next(iter(progress.scores), None)
    if score is not None:
        parts.append(named(score, progress.scores[score]))
    if progress.epsilon is not None:
        parts.append(f"epsilon {progress.epsilon:.3g}")
    parts.append(f"{progress.accepted} updates")
    if progress.rejected:
        counts = (f"{reason} x{count}" for reason, count in progress.rejected.items())
        parts.append(f"rejected {', '.join(counts)}")
    return ", ".join([*parts, f"{run.starts} start{'' if run.starts == 1 else 's'}"])


def _row(name: str, text: str) -> str:
    return f"{name:<{COLUMN}}{text}"
