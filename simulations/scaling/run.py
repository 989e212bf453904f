"""What does a round of a thousand clients cost in time and in the server's memory?

    python simulations/scaling/run.py            # about 2 minutes on 2 cores
    python simulations/scaling/run.py --quick    # a smoke run

All runs are `experiment=fleet` on the real clock: 1,000 iid clients, of which 4 to 1,000 take part
in each of 3 rounds, each with 2 steps of 256 tokens and fresh optimiser moments. The runs take
place one after the other, with one worker per core. Seconds a round are the mean over the rounds
after the first, which also starts the workers. The server's memory is the kernel's peak of the
resident set (VmHWM) of the process that contains the server, from its start to its end; this needs
Linux.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import COLOURS, arguments, run, runs_folder, table, write_results

COMMON = [
    *("experiment=fleet", "clock=real", "fleet=none", "evaluate.every=0"),
    *("partition.clients=1000", "partition.piece=512", "tokens=0", "rounds=3"),
    *("local=reset", "local.steps=2", "local.batch_size=4"),
]
QUICK = ["partition.clients=16", "rounds=2", "evaluate.tokens=2048", "tokenizer=bytes"]
CLIENTS = (4, 16, 64, 256, 1000)  # clients a round
FIGURES = {
    "seconds_a_round": "seconds a round",
    "tokens_a_second": "tokens a second",
    "server_peak_bytes": "server peak, MB",
    "megabytes_up": "MB up",
    "loss": "held-out loss",
}


def main() -> None:
    chosen = arguments(__doc__ or "")
    folder, common = runs_folder(chosen.runs), [*COMMON, *(QUICK if chosen.quick else [])]
    cohorts = CLIENTS[:2] if chosen.quick else CLIENTS
    figures = {clients: measure(folder, clients, common) for clients in cohorts}
    rows = [(f"{clients:,}", *cells(f)) for clients, f in figures.items()]
    print(table(("clients a round", *FIGURES.values()), rows))
    draw(figures, (folder if chosen.quick else STUDY) / "figure.png")
    if not chosen.quick:
        write_results(STUDY, [0], {"clients_a_round": figures, "options": common})


def measure(folder: Path, clients: int, common: list[str]) -> dict[str, float]:
    """Run with so many clients a round; returns the figures.

    The peak is saved in the folder of the run, so that a study can reuse the run.
    """
    here = folder / f"{clients}-clients"
    peak = here / "server_peak_bytes"
    if not peak.exists():
        measured = watched(here, *common, f"pace.clients={clients}")
        peak.write_text(str(measured))
    done = run(here)
    first, *_, last = done.metrics[1:]
    seconds, tokens = last["wall_seconds"] - first["wall_seconds"], last["tokens"] - first["tokens"]
    return {
        "seconds_a_round": seconds / (last["version"] - first["version"]),
        "tokens_a_second": tokens / seconds,
        "server_peak_bytes": int(peak.read_text()),
        "megabytes_up": done.summary["bytes_up"] / 1e6,
        "loss": done.summary["final"]["loss"],
    }


def watched(folder: Path, *options: str) -> int:
    """Do the run; returns the peak of its resident set in bytes."""
    peak = 0
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, folder, *options)
        while not running.done():
            peak = max(peak, *(high_water(int(pid)) for pid in children()), 0)
            time.sleep(0.05)
        running.result()
    return peak


def children() -> list[str]:
    """Ids of the processes that this process has started."""
    return [
        pid
        for listed in Path("/proc/self/task").glob("*/children")
        for pid in listed.read_text().split()
    ]


def high_water(pid: int) -> int:
    """The peak of a process's resident set in bytes; 0 if the process has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def cells(f: dict[str, float]) -> tuple[str, ...]:
    seconds, speed, peak, sent, loss = (f[name] for name in FIGURES)
    return f"{seconds:.2f}", f"{speed:,.0f}", f"{peak / 1e6:.0f}", f"{sent:,.0f}", f"{loss:.3f}"


def draw(figures: dict[int, dict[str, float]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for axis, (name, label), colour in zip(axes, FIGURES.items(), COLOURS, strict=False):
        scale = 1e-6 if name == "server_peak_bytes" else 1.0
        values = [scale * f[name] for f in figures.values()]
        axis.plot(list(figures), values, marker="o", markersize=4, color=colour)
        axis.set_xscale("log")
        axis.set_xticks(list(figures), [f"{clients:,}" for clients in figures])
        axis.minorticks_off()
        if name == "seconds_a_round":
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.15 * max(values))
        axis.set_xlabel("clients a round")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
