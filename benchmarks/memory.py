"""Does the server's memory grow with the cohort? 64 clients a round against 8, with the mini model.

    python benchmarks/memory.py              # about two minutes on 2 cores
    python benchmarks/memory.py --quick      # a smoke run with the nano model, under a minute

Both runs are `fedgpt run` on the pool, in a process of their own that contains the server. They
have the same 64 clients (partition=iid) and two rounds of one local step on one sequence. The peak
of that process is the sum of

  - the kernel's peak of its resident set (VmHWM: its own memory, and every page of a reply that it
    has mapped and read), and
  - the largest amount, over samples, of shared memory for which it has an open descriptor but no
    mapping.

The second part is needed because a reply that waits for the server is in no process's resident set
and yet takes memory. Pages may be counted in both parts, but are never left out.

The peak is measured during the rounds only: it is reset (/proc/PID/clear_refs) at the first job and
read until the last server step. No evaluation takes place in between, and the report after the last
step would add one copy of the model for any cohort. `growth_model_copies` is
(peak_64 - peak_8) / model_bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common import Versions, child, fedgpt_run, machine
from safetensors import safe_open

SAMPLE = 0.005  # seconds between two samples of the process
COHORTS = (8, 64)  # clients a round
OPTIONS = (
    *("corpus=sotu", "partition=iid", "partition.clients=64"),
    *("local.steps=1", "local.batch_size=1", "local.moments=reset"),
    *("evaluate=ends", "evaluate.tokens=256", "checkpoint=none", "rounds=2"),
)


@dataclass(frozen=True)
class Peak:
    """The server's peak in bytes, and the size of the model."""

    resident: int  # resident set
    unmapped: int  # shared memory with a descriptor but no mapping
    model: int  # bytes of one copy of the model

    @property
    def total(self) -> int:
        return self.resident + self.unmapped


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: nano model, one round")
    parser.add_argument("options", nargs="*", help="more options of fedgpt run")
    chosen = parser.parse_args()
    model, about = "nano" if chosen.quick else "mini", machine()
    extra = ["rounds=1"] if chosen.quick else []
    print(f"clients a round   resident MB        unmapped MB   peak MB   ({model} model)")
    peaks = {}
    for cohort in COHORTS:
        peaks[cohort] = p = measure(
            [*OPTIONS, f"model={model}", f"pace.clients={cohort}", *extra, *chosen.options]
        )
        print(
            f"{cohort:<15} {p.resident / 1e6:>13.1f} {p.unmapped / 1e6:>18.1f}"
            f" {p.total / 1e6:>9.1f}",
            flush=True,
        )
    few, many = (peaks[cohort] for cohort in COHORTS)
    growth = (many.total - few.total) / many.model
    print(f"growth: {growth:.2f} copies of the model, {many.model / 1e6:.1f} MB each")
    figures = {
        "growth_model_copies": round(growth, 3),
        "model_bytes": many.model,
        **{f"peak_{cohort}": peak.total for cohort, peak in peaks.items()},
        **{f"resident_{cohort}": peak.resident for cohort, peak in peaks.items()},
        **{f"unmapped_{cohort}": peak.unmapped for cohort, peak in peaks.items()},
    }
    print(json.dumps({**figures, "model": model, **about}))


def measure(options: list[str]) -> Peak:
    """The server's peak in one run."""
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name, "run")
        rounds = next(
            int(o.removeprefix("rounds=")) for o in reversed(options) if o.startswith("rounds=")
        )
        with child(fedgpt_run(folder, options), folder.with_suffix(".log")) as process:
            events = folder / "events.jsonl"
            while process.poll() is None and not (events.exists() and events.stat().st_size):
                time.sleep(SAMPLE)
            resident = unmapped = 0
            if process.poll() is None:
                # reset the peak
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
                resident, unmapped = watch(process.pid, folder, rounds)
            process.wait()
        # after the block, which reports a run that failed
        with safe_open(
            next((folder / "checkpoints").glob("*.safetensors")), framework="numpy"
        ) as stored:
            model = 4 * stored.get_slice("params").get_shape()[0]
    return Peak(resident, unmapped, model)


def watch(pid: int, folder: Path, rounds: int) -> tuple[int, int]:
    """(peak resident set, peak of unmapped shared memory) until the last server step."""
    resident, unmapped, steps = 0, 0, Versions(folder)
    with suppress(
        FileNotFoundError, ProcessLookupError
    ):  # the run has failed, which `child` reports
        while True:
            peak, now = high_water(pid), unmapped_bytes(pid)
            if steps.look() >= rounds:  # these two may have been read after the last step
                break
            resident, unmapped = peak, max(unmapped, now)
            time.sleep(SAMPLE)
    return resident, unmapped


def high_water(pid: int) -> int:
    """The peak of the resident set since the last reset, in bytes."""
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith("VmHWM:"):
            return 1024 * int(text.split()[1])
    raise ProcessLookupError(pid)  # the process has ended


def unmapped_bytes(pid: int) -> int:
    """Bytes of anonymous shared memory for which a process has a descriptor but no mapping."""
    sizes: dict[int, int] = {}  # inode -> bytes
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            if "memfd:" in str(path.readlink()):
                about = path.stat()
                sizes[about.st_ino] = 512 * about.st_blocks
    mapped = {
        int(text.split()[4])
        for text in Path(f"/proc/{pid}/maps").read_text().splitlines()
        if "memfd:" in text
    }
    return sum(size for inode, size in sizes.items() if inode not in mapped)


if __name__ == "__main__":
    main()
