"""metrics.csv in the run's folder: a table that a spreadsheet opens, one row for each version."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedgpt.core.events import Event, MetricsReady
from fedgpt.core.files import replacing
from fedgpt.report.trackers.base import TrackedRun, Tracker, flat


@dataclass
class CsvTracker(Tracker):
    """Writes scores and counters of each version as a row of comma-separated values.

    The first version's line determines the columns. A missing value is an empty cell.
    """

    file: str = "metrics.csv"  # name of the file in the run's folder

    def __post_init__(self) -> None:
        if not self.file or Path(self.file).name != self.file:
            raise ValueError(f"file={self.file}: must be the name of a file, without a folder")
        self._stream: IO[str] | None = None
        self._columns: list[str] = []

    def open(self, run: TrackedRun) -> int:
        """Keep the rows before `run.resumed_at`; a row that a kill truncated is deleted."""
        path = run.folder / self.file
        rows = [row for row in _complete_rows(path) if int(row["version"]) < run.resumed_at]
        self._columns = list(rows[0]) if rows else []
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as new:
            if rows:
                writer = self._writer(new)
                writer.writeheader()
                writer.writerows(rows)
        self._stream = path.open("a", encoding="utf-8", newline="")
        return int(rows[-1]["version"]) if rows else -1

    def __call__(self, event: Event) -> None:
        """Append the row of a version and flush it to the operating system."""
        if not isinstance(event, MetricsReady):
            return
        assert self._stream is not None, "open comes first"
        row = flat(event.metrics)
        if not self._columns:
            self._columns = list(row)
            self._writer(self._stream).writeheader()
        self._writer(self._stream).writerow(row)
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def _writer(self, stream: IO[str]) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, self._columns, extrasaction="ignore", lineterminator="\n")


def _complete_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table, up to the first row without a version or without a value for each column."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = []
    for row in csv.DictReader(line for line in lines if line.endswith("\n")):
        if None in row or None in row.values() or not row.get("version", "").isdecimal():
            break
        rows.append(row)
    return rows
