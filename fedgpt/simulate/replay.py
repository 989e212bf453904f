"""fleet=replay: the virtual clock repeats the arrivals that an earlier run recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedgpt.core.messages import Job, JobTime
from fedgpt.core.options import RunOptions
from fedgpt.simulate.fleet import Trip
from fedgpt.storage.run_folder import read_lines

# codes of rejected updates that say nothing about the arrival of a reply
NO_ARRIVAL = ("no_reply", "late", "duplicate")


class Replay:
    """The arrivals in an events.jsonl: each job's reply comes at its recorded time and in order."""

    def __init__(self, path: str | Path):
        """Read the record; jobs without an arrival are left out."""
        self.path = path
        self._trips: dict[tuple[str, int], Trip] = {}  # (client, job number) -> trip
        for order, event in enumerate(read_lines(Path(path))):
            if event["event"] not in ("accept", "reject") or event.get("code") in NO_ARRIVAL:
                continue
            # earlier versions called the job number "task"
            number = event["number"] if "number" in event else event["task"]
            lost = event.get("detail", "") if event.get("code") == "client_error" else ""
            self._trips[event["client"], number] = Trip(
                event["seconds"], lost, order=order, job_time=_job_time(event)
            )

    def meet(self, clients: Sequence[str]) -> None:
        """Do nothing: the record names the clients."""

    def trip(self, job: Job, bytes_down: int) -> Trip:
        """The recorded trip; a job without a recorded arrival never arrives."""
        return self._trips.get((job.client, job.number), Trip(math.inf, lost="not in the record"))

    def available(self, client: str, now: float) -> bool:
        """Always true: the recorded run sent jobs to available clients only."""
        return True

    def opening(self, now: float) -> float:
        """Infinity, because clients are always available."""
        return math.inf


def _job_time(event: dict) -> JobTime | None:
    """The recorded time of a job; None if the record has none."""
    if not event.get("measured", True):
        return JobTime(measured=False)
    seconds = event.get("train_seconds")
    return None if seconds is None else JobTime(seconds)


def replay_problems(options: RunOptions, switches: bool) -> Iterator[str]:
    """Yield a message for each option whose effect a record of arrivals cannot repeat.

    `switches` says whether the strategy may change the pacing.
    """
    if options.fleet.name != "replay":
        return
    why = "fleet=replay: a record contains when replies arrived"
    for name in ("grace", "deadline"):
        if (value := getattr(options.pace, name)) is not None:
            yield (
                f"pace.{name}={value:g}: {why}, not when the server stopped waiting for others;"
                f" only runs without pace.{name} can be replayed: leave it out in both"
            )
    if options.privacy.unit != "none" and options.privacy.rng == "secure":
        yield (
            f"privacy={options.privacy.unit}: {why}, and secret noise cannot be repeated; only runs"
            " without privacy, or with privacy.rng=seeded in both, can be replayed"
        )
    if switches:
        yield (
            f"strategy=auto: {why}, not how long the other clients had worked when the strategy"
            " chose the pacing; only runs of one pacing can be replayed: name it, e.g. pace=buffer"
            " strategy=delta_sgd, in both"
        )
