"""Whether the updates that a run has applied are those of its journal: none twice, none lost."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedgpt.storage.journal import Journal
from fedgpt.storage.run_folder import read_lines

Update = tuple[str, int]  # a client, and the number of its job


class Applied:
    """The updates of runs, as they were seen while the runs went on.

    A server that continues a run deletes the events after its checkpoint, and writes them again
    from its journal. So at any moment the events are the beginning of what they were or will be.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, list[Update]] = defaultdict(list)  # run -> the most seen at once
        self._journalled: dict[Path, set[Update]] = defaultdict(set)
        self._problems: dict[Path, list[str]] = defaultdict(list)
        self._updates = self._rejected = self._compared = self._entries = 0

    def look(self, run: Path) -> None:
        """Compare the events of a run with those that were seen before."""
        now = accepted(run)
        short, long = sorted((self._seen[run], now), key=len)
        if long[: len(short)] != short:
            self._problems[run].append(f"{run.name}: the updates changed: {short} -> {long}")
        self._seen[run] = long

    def compare_journal(self, run: Path) -> None:
        """Compare the events with the journal, while no server of the run is alive."""
        logs = sorted((run / "wal").glob("version-*.log"))
        if not logs or (run / "summary.json").exists():
            return
        first = int(logs[0].stem.removeprefix("version-"))
        with tempfile.TemporaryDirectory() as copy:  # reading mends a journal
            shutil.copytree(run / "wal", Path(copy) / "wal")
            entries = list(Journal(Path(copy) / "wal").read(first))
        replies = [(reply.client, reply.number) for one in entries for reply in one.replies]
        self._compared += 1
        self._entries += len(replies)
        self._journalled[run].update(replies)
        if missing := [one for one in accepted(run, first) if one not in replies]:
            self._problems[run].append(f"{run.name}: applied and not in the journal: {missing}")

    def problems(self, run: Path, versions: int) -> list[str]:
        """What is wrong with a run that has ended and makes a version of every update."""
        self.look(run)
        updates, problems = accepted(run), self._problems[run]
        if lost := self._seen[run][len(updates) :]:
            problems.append(f"{run.name}: applied once, and not at the end: {lost}")
        rejected = {(e["client"], e["number"]) for e in events(run) if e["event"] == "reject"}
        self._updates += len(updates)
        self._rejected += len(rejected)
        if not (run / "summary.json").exists():
            problems.append(f"{run.name}: it has no summary.json")
        if len(set(updates)) != len(updates):
            problems.append(f"{run.name}: an update was applied twice")
        in_versions = sum(line["accepted"] for line in read_lines(run / "metrics.jsonl", "version"))
        if not len(updates) == in_versions == versions:
            counts = f"{len(updates)} updates, {in_versions} of them in {versions} versions"
            problems.append(f"{run.name}: {counts}")
        if lost := self._journalled[run] - set(updates) - rejected:
            problems.append(f"{run.name}: in the journal and not applied: {sorted(lost)}")
        return problems

    def figures(self) -> dict[str, Any]:
        """Counts over all runs that have ended."""
        return {
            "updates_applied": self._updates,
            "jobs_rejected": self._rejected,
            "journals_compared": self._compared,
            "replies_in_these_journals": self._entries,
        }


def events(run: Path) -> list[dict[str, Any]]:
    """The complete events of a run."""
    return list(read_lines(run / "events.jsonl", "event"))


def accepted(run: Path, after: int = -1) -> list[Update]:
    """The updates that a run has applied, after it made the version `after`."""
    found = events(run)
    made = [i for i, e in enumerate(found) if e["event"] == "version" and e["version"] == after]
    rest = found[made[0] + 1 :] if made else found
    return [(one["client"], one["number"]) for one in rest if one["event"] == "accept"]
