"""What do kill -9 and restarts cost a run? Some time, and no bit of its weights.

    python simulations/chaos/run.py            # about 10 minutes on 2 cores
    python simulations/chaos/run.py --quick    # a smoke run

Each run takes place twice, once undisturbed and once disturbed: at random moments its server or one
of its workers gets SIGKILL, and whenever the server is dead the run is started again with
`resume=`. Rounds on the real clock and an asynchronous run on the virtual clock must end with the
weights of the undisturbed run, bit for bit. The weights of an asynchronous run on the real clock
depend on the order of the replies, so it is only run disturbed, and the log of its accepted updates
must have lost none and counted none twice. At the end no process of the run may be alive, no name
may be left in shared memory, and the server must not have opened more and more descriptors as its
workers died.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fedgpt
from fedgpt.storage.run_folder import read_lines

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import arguments, run, runs_folder, table, write_results

COMMON = [
    *("experiment=fleet", "tokens=0", "tokenizer=bytes", "local.steps=10", "local.batch_size=4"),
    *("runtime.workers=2", "runtime.threads=1", "checkpoint.every=null"),
    *("evaluate.tokens=4096", "evaluate.every=5"),
]
ROUNDS = ["clock=real", "fleet=none", "partition.clients=8", "pace.clients=8"]
ARMS = {
    "rounds": [*ROUNDS, "rounds=30"],
    "asynchronous, virtual clock": ["pace=buffer", "pace.clients=4", "rounds=120"],
    "asynchronous, real clock": [*ROUNDS, "pace=buffer", "rounds=240"],
}
EXACT = ("rounds", "asynchronous, virtual clock")  # arms whose weights do not depend on time
MARK = "FEDGPT_CHAOS_MARK"  # environment variable that marks the processes of a run
KILLS, LEAST = 18, 15  # largest number of kills in an arm, and the number needed for a conclusion
# descriptors that a server may have beyond those at its first kill; replies in transit need some
DESCRIPTORS = 24
# mean seconds from the first job of a start, or from the last kill, to the next kill
SECONDS = 2.0
SERVER = 0.5  # share of the kills that hit the server


class Chaos:
    """One disturbed run."""

    def __init__(self, folder: Path, options: list[str], seed: int, wanted: int):
        """A run that gets at most `wanted` kills."""
        self.folder, self.options, self.wanted = folder, options, wanted
        self.random, self.mark = random.Random(seed), uuid.uuid4().hex
        self.kills: Counter[str] = Counter()
        self.starts = 0
        self.seen: list[dict[str, Any]] = []  # the accept events before the last kill of the server
        self.descriptors: list[
            int
        ] = []  # descriptors of the server, minus those before the first kill
        self.wrong: list[str] = []  # what went wrong, in words

    def go(self) -> fedgpt.Run:
        """Start the run again until it has finished."""
        code = None
        while code != 0:
            if self.starts and (self.folder / "config.yaml").exists():
                arguments = [f"resume={self.folder}"]
            else:  # the first start, or killed before it had written anything
                arguments = [*self.options, f"run_dir={self.folder}"]
            code = self._start(arguments)
            if self.starts > 200:
                sys.exit(f"not finished after 200 starts; see {self.folder}")
        return fedgpt.open_run(self.folder)

    def leftovers(self) -> list[int]:
        """Processes of this run that are still alive after 10 s."""
        end = time.monotonic() + 10
        while (found := list(self._processes())) and time.monotonic() < end:
            time.sleep(0.1)
        return found

    def _start(self, arguments: list[str]) -> int:
        """Start the server and wait until it has finished or died; returns its exit code."""
        self.starts += 1
        environment = {**os.environ, MARK: self.mark}
        command = [sys.executable, "-m", "fedgpt", "run", *arguments]
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            before = 0
            self._wait_for_work(process)
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.random.expovariate(1 / SECONDS))
                if process.poll() is None and sum(self.kills.values()) < self.wanted:
                    workers = children(process.pid)
                    before = before or descriptors(process.pid)
                    self.descriptors.append(descriptors(process.pid) - before)
                    if self.random.random() < SERVER or not workers:
                        self._remember()
                        self._kill("server", process.pid)
                    else:
                        self._kill("worker", self.random.choice(workers))
            code = process.wait()
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"exit code {code}; see {log.name}")
        if left := self.leftovers():
            self.wrong.append(f"processes {left} outlived their server")
        return code

    def _wait_for_work(self, process: subprocess.Popen[bytes]) -> None:
        """Return when the server has sent a job, or, in one start of five, earlier at random."""
        events = self.folder / "events.jsonl"
        before = events.stat().st_mtime if events.exists() else 0.0
        # 0.4 % in each 0.1 s: 20 % in the 5 s that a start takes
        while process.poll() is None and self.random.random() > 0.004:
            if events.exists() and events.stat().st_mtime > before and events.stat().st_size:
                return
            time.sleep(0.1)

    def _kill(self, role: str, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills[role] += 1

    def _remember(self) -> None:
        """Note the accepted updates, which must not be lost."""
        self.seen = [e for e in read_lines(self.folder / "events.jsonl") if e["event"] == "accept"]

    def _processes(self) -> Iterator[int]:
        entry = f"{MARK}={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if entry in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)


def main() -> None:
    chosen = arguments(__doc__ or "")
    folder = runs_folder(chosen.runs)
    arms = {"rounds": [*ROUNDS, "rounds=4"]} if chosen.quick else ARMS
    wanted = 2 if chosen.quick else KILLS
    shared = names_in_shared_memory()
    figures = {}
    for number, (name, options) in enumerate(arms.items()):
        slug = name.replace(", ", "-").replace(" ", "-")
        calm = run(folder / f"{slug}-calm", *COMMON, *options) if name in EXACT else None
        chaos = Chaos(folder / f"{slug}-chaos", [*COMMON, *options], seed=number, wanted=wanted)
        figures[name] = measured(chaos, chaos.go(), calm)
        print(f"{name}: {figures[name]}", flush=True)
    left = sorted(names_in_shared_memory() - shared)
    head = ("run", "kills of the server", "of workers", "starts", "identical", "counted twice")
    print(table(head, rows(figures)))
    least = 0 if chosen.quick else LEAST
    problems = [
        f"{name}: {problem}" for name, figure in figures.items() for problem in wrong(figure, least)
    ]
    problems += [f"left in shared memory: {', '.join(left)}"] * bool(left)
    print("\n".join(problems) or "nothing lost, nothing counted twice, nothing left behind")
    if not chosen.quick:
        results = {
            "identical": not problems,
            "problems": problems,
            "kills": sum(sum(f["kills"].values()) for f in figures.values()),
            "arms": figures,
            "options": {name: [*COMMON, *options] for name, options in arms.items()},
        }
        write_results(STUDY, [0, 1, 2], results)
    sys.exit(1 if problems else 0)


def wrong(figure: dict[str, Any], least: int) -> list[str]:
    """The problems in the figures of an arm, in words."""
    zero = ("counted_twice", "lost", "state_lost", "processes_left", "wrong")
    found = [f"{name}: {figure[name]}" for name in zero if figure[name]]
    if figure["identical"] is False:
        found.append("ended with other weights or numbers than the undisturbed run")
    if sum(figure["kills"].values()) < least:
        found.append(f"{sum(figure['kills'].values())} kills, at least {least} are needed")
    if figure["more_descriptors"] > DESCRIPTORS:
        found.append(
            f"its server had {figure['more_descriptors']} descriptors more than at its first kill"
        )
    return found


def measured(chaos: Chaos, disturbed: fedgpt.Run, calm: fedgpt.Run | None) -> dict[str, Any]:
    """The figures of a disturbed run."""
    accepted = [e for e in read_lines(chaos.folder / "events.jsonl") if e["event"] == "accept"]
    numbers = Counter((e["client"], e["number"]) for e in accepted)
    before = [(e["client"], e["number"]) for e in chaos.seen]
    return {
        "kills": dict(chaos.kills),
        "starts": chaos.starts,
        "versions": disturbed.summary["versions"],
        "identical": None if calm is None else same(calm.summary, disturbed.summary),
        "counted_twice": sum(count - 1 for count in numbers.values()),
        "lost": sum(number not in numbers for number in before),
        "state_lost": sum(record["state_lost"] for record in disturbed.metrics),
        "more_descriptors": max(chaos.descriptors, default=0),
        "processes_left": chaos.leftovers(),
        "wrong": chaos.wrong,
    }


def same(calm: dict[str, Any], disturbed: dict[str, Any]) -> bool:
    """Whether two summaries (weights, scores, bytes, rejections) are equal, except for the time."""
    return {**calm, "wall_seconds": 0} == {**disturbed, "wall_seconds": 0}


def rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            str(f["kills"].get("server", 0)),
            str(f["kills"].get("worker", 0)),
            str(f["starts"]),
            {True: "yes", False: "NO", None: "not defined"}[f["identical"]],
            str(f["counted_twice"]),
        )
        for name, f in figures.items()
    ]


def children(pid: int) -> list[int]:
    """The direct children of a process, started by any of its threads."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return sorted(found)


def descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def names_in_shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


if __name__ == "__main__":
    main()
