"""Shared by the benchmarks: runs as child processes, and the kernel's numbers about them.

The numbers come from /proc, so they need Linux.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")  # clock ticks a second, the unit of CPU times in /proc


@contextmanager
def child(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process `python *command` that ends with the block.

    Its output goes to `log`, and is shown if it fails.
    """
    # SIGTERM ends the benchmark like Ctrl-C, so that no child stays behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=out, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                # a fedgpt run and the plain loop both end their own children
                process.send_signal(signal.SIGTERM)
                signal_all(process.pid, signal.SIGCONT)
                process.wait()
    refuse_failure(process, log)


def refuse_failure(process: subprocess.Popen[bytes], log: Path) -> None:
    """End the benchmark with the output of a child that failed."""
    if process.returncode:
        raise SystemExit(
            f"{process.args} ended with {process.returncode}:\n{log.read_text()[-3000:]}"
        )


def family(pid: int) -> list[int]:
    """The ids of a process and its living descendants."""
    below = [
        int(i)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for i in path.read_text().split()
    ]
    return [pid, *(i for child in below for i in family(child))]


def signal_all(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and its descendants."""
    for i in family(pid):
        with suppress(ProcessLookupError):
            os.kill(i, number)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its living descendants so far, user and system."""
    stats = (Path(f"/proc/{i}/stat").read_text().rpartition(")")[2].split() for i in family(pid))
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / TICK


def fedgpt_run(folder: Path, options: Sequence[str]) -> list[str]:
    """The command for a run with `options` in `folder`."""
    return ["-m", "fedgpt", "run", *options, f"run_dir={folder}"]


class Versions:
    """Counts the server steps in a run's events.jsonl; it reads each byte once, so it is cheap."""

    def __init__(self, folder: Path):
        self.path, self.count, self._offset = folder / "events.jsonl", 0, 0

    def look(self) -> int:
        """The number of server steps so far."""
        try:
            if self.path.stat().st_size == self._offset:
                return self.count
        except FileNotFoundError:
            return 0
        with self.path.open("rb") as stream:
            stream.seek(self._offset)
            lines, end, _ = stream.read().rpartition(b"\n")  # the last line may be incomplete
        self._offset += len(lines + end)
        self.count += sum(json.loads(line)["event"] == "version" for line in lines.splitlines())
        return self.count


def machine(precision: str = "auto") -> dict[str, Any]:
    """What the figures depend on besides the code."""
    import torch

    from fedgpt.core.device import choose_compute, cores

    compute = choose_compute("auto", precision)
    return {
        "cores": cores(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
        "torch": torch.__version__,
        "device": compute.device,
        "dtype": compute.dtype,
        "dtype_reason": compute.reason,
    }
