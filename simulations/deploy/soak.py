"""Clients come and go, links are cut, the server is killed: does every run end all the same?

    python simulations/deploy/soak.py --minutes 60     # writes soak.json
    python simulations/deploy/soak.py --minutes 3 --quick

Ctrl-C ends it earlier.

A server takes one short run after the other for the given time. Meanwhile something happens every
few seconds, drawn with a seed: the line between a client and the server is cut for a while, a
client is stopped or killed, or a process of the server is killed: the server itself, its link, the
keeper of the link, or the ServerApp. Whatever has ended is started again. One client is never
stopped, and in the last third of the time no process of the server is killed, so that there are
processes that live long. At the end nothing happens any more, and the last run must end, too.

At each kill of the server the run's journal is compared with the updates that were applied until
then, and at the end of a run with those that were applied at last (`Applied`). Memory, open files
and threads of all processes are read all the time (growth.py). soak.json names what was `wrong`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from applied import Applied
from deployment import SITES, Deployment, deployment, free_port, wait_until
from growth import Growth, processes_in
from line import Line

from fedgpt.core.files import PRIVATE, read_json, write_text
from fedgpt.flower.deploy import queue
from fedgpt.flower.deploy.queue import QueuedRun
from fedgpt.flower.deploy.supervise import newest_version

VERSIONS = 120  # of each run
SMALL = (
    *("pace=buffer", "pace.clients=3", "pace.begin=1", f"rounds={VERSIONS}"),
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=2", "local.batch_size=2", "evaluate.tokens=1024", "evaluate.samples=0"),
    *("evaluate=ends", "tokenizer.vocab_size=300", "runtime.threads=1", "checkpoint.every=20"),
)
QUIET = 20.0  # seconds from the first version to the first disturbance
PAUSE = (12.0, 36.0)  # seconds between two disturbances, at least and at most
CUTS = (3.0, 8.0, 20.0, 60.0)  # seconds; after 60 the server has given the client up
STAYS = "west"  # the client that is never stopped
DEAD_SECONDS = 60.0  # for the ServerApp to end after a kill of the server, the link or its keeper
START_SECONDS = 900.0  # for the first version of the first run
END_SECONDS = 900.0  # for the last run, after the last disturbance
# how many of each disturbance are in the deck from which the next one is drawn; the first deck
# has one of each
CLIENTS = {"cut": 9, "stop_client": 3, "kill_client": 3}
SERVER = {"kill_server": 1, "kill_link": 1, "kill_keeper": 1, "kill_serverapp": 1}
MOST_KILLS = 2  # of the server before a run has a new version: after 5 starts it is given up


class Soak:
    """A deployment that is disturbed."""

    def __init__(self, one: Deployment, seed: int, minutes: float):
        self.one, self.random = one, random.Random(seed)
        self.began = time.monotonic()
        self.seconds = 60 * minutes
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.growth = Growth(one.folder)
        self.applied = Applied()
        self.submitted = 0
        self._kills = 0  # of the server since there was a new version
        self._newest: tuple[int, int] = (0, -1)  # run and version
        self._lines: dict[str, Line] = {}
        self._mend_at: dict[str, float] = {}
        self._deck = [*CLIENTS, *SERVER]
        self.random.shuffle(self._deck)

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def make_sites(self, ends: ExitStack) -> None:
        """Make the keys; each site reaches the server by a line of its own."""
        one = self.one
        one.write_texts()
        one.command("keys", "init", "server", "--host", "localhost", "--port", str(one.port))
        settings = one.server / "server.json"
        content = read_json(settings)
        for site in SITES:
            port = free_port()
            # a site keeps the address that the server had when it was approved
            write_text(settings, json.dumps(content | {"port": port}), mode=PRIVATE)
            one.command("keys", "request", site)
            one.command("keys", "approve", "server", f"{site}.request")
            self._lines[site] = Line(port, one.port)
            ends.enter_context(self._lines[site].opened())
        write_text(settings, json.dumps(content), mode=PRIVATE)

    def soak(self) -> None:
        """Disturb the deployment while it takes runs, and let the last one end."""
        self._within(START_SECONDS, self._has_begun, "the first version")
        self.began, next_act = time.monotonic(), QUIET
        try:
            while self.age < self.seconds:
                self.keep_up()
                if self.age > next_act:
                    self.disturb()
                    next_act = self.age + self.random.uniform(*PAUSE)
                time.sleep(1)
        except KeyboardInterrupt:
            self.seconds = self.age

        def all_ended() -> bool:
            self.keep_up()
            return all(run.ended is not None for run in self.runs())

        for line in self._lines.values():
            line.mend()
        self._within(END_SECONDS, all_ended, "the end of the last run")

    def stop(self) -> None:
        """Stop all processes."""
        for name in list(self.one.processes):
            self._stop(name, signal.SIGTERM)

    def _within(self, seconds: float, condition: Callable[[], bool], what: str) -> None:
        try:
            wait_until(condition, seconds, what)
        except TimeoutError as late:
            self.wrong.append(str(late))

    def _stop(self, name: str, by: int) -> None:
        try:
            self.one.stop(name, by)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{name} did not end after signal {by}")

    def runs(self) -> list[QueuedRun]:
        """The server's runs."""
        return queue.runs(self.one.server)

    def _has_begun(self) -> bool:
        self.keep_up()
        return self._newest > (0, -1)

    def keep_up(self) -> None:
        """Mend, start and submit what is due, and take samples."""
        for site, line in self._lines.items():
            if not line.whole and self.age > self._mend_at[site]:
                line.mend()
        for name in ("server", *SITES):
            process = self.one.processes.get(name)
            if process is not None and process.poll() is not None:
                self.wrong.append(f"{name} ended by itself, with exit code {process.returncode}")
                del self.one.processes[name]
            if name not in self.one.processes:
                self.one.start_server() if name == "server" else self.one.start_client(name)
        if self.age < self.seconds and not any(run.waits for run in self.runs()):
            self.submitted += 1
            options = self.one.run_options(f"name=soak{self.submitted}", *SMALL)
            self.one.command("submit", "server", *options)
        self.growth.look()
        for run in self.runs():
            self.applied.look(Path(run.run_dir))
            newest = run.number, newest_version(run.run_dir)
            if newest[1] >= 0 and newest > self._newest:
                self._newest, self._kills = newest, 0

    def disturb(self) -> None:
        """Let one thing happen."""
        spared = self.age > self.seconds * 2 / 3 or self._kills == MOST_KILLS
        kinds = CLIENTS if spared else {**CLIENTS, **SERVER}
        if not any(act in kinds for act in self._deck):
            more = [act for act, times in {**CLIENTS, **SERVER}.items() for _ in range(times)]
            self.random.shuffle(more)
            self._deck += more
        act = next(act for act in self._deck if act in kinds)
        self._deck.remove(act)
        self.counts[act] += 1
        acts: dict[str, Callable[[], None]] = {
            "cut": self._cut,
            "stop_client": lambda: self._end_client(signal.SIGTERM),
            "kill_client": lambda: self._end_client(signal.SIGKILL),
        }
        acts.get(act, lambda: self._kill_server(act.removeprefix("kill_")))()

    def _cut(self) -> None:
        site = self.random.choice(list(SITES))
        self._lines[site].cut()
        self._mend_at[site] = self.age + self.random.choice(CUTS)

    def _end_client(self, by: int) -> None:
        self._stop(self.random.choice([site for site in SITES if site != STAYS]), by)

    def _kill_server(self, which: str) -> None:
        """Kill a process of the server, and compare the journal when its ServerApp has ended."""
        self._kills += 1
        kind = {"serverapp": "flwr-serverapp"}.get(which, which)
        below = list(processes_in(self.one.folder))
        killed = {process.pid for process in below if process.kind == kind}
        if kind == "keeper":  # that of the link; the link has one as well
            killed = {pid for pid in killed if _parent(pid) == self.one.processes["server"].pid}
        if kind == "server":
            self._stop("server", signal.SIGKILL)
        for pid in killed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        apps = {process for process in below if process.kind == "flwr-serverapp"}
        self._within(
            DEAD_SECONDS,
            lambda: not apps & set(processes_in(self.one.folder)),
            f"the end of the ServerApp after a kill of the {which}",
        )
        for run in self.runs():
            if run.running:
                self.applied.compare_journal(Path(run.run_dir))

    def figures(self) -> dict[str, Any]:
        """What happened, after the end of all processes."""
        runs = self.runs()
        for run in runs:
            if run.exit_code != 0:
                self.wrong.append(f"run {run.number} ended with {run.exit_code}: {run.reason}")
            self.wrong += self.applied.problems(Path(run.run_dir), VERSIONS)
        for path in (self.one.folder / "logs").iterdir():
            if times := path.read_text().count("Traceback (most recent call last)"):
                self.wrong.append(f"{path.name} has {times} tracebacks")
        self.wrong += [f"{one.kind} outlives the end" for one in processes_in(self.one.folder)]
        self.wrong += self.growth.wrong()
        server = self.one.server
        return {
            "runs": len(runs),
            "versions": VERSIONS * len(runs),
            "starts": sum(run.starts for run in runs),
            "disturbances": dict(sorted(self.counts.items())),
            **self.applied.figures(),
            "wrong": self.wrong,
            "processes": self.growth.figures(),
            "server_kb": {
                "runs": _kilobytes(server / "runs"),
                "link.db": _kilobytes(server, "link.db*"),
                "other": _kilobytes(server) - _kilobytes(server / "runs"),
            },
        }


def _kilobytes(folder: Path, files: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(files) if path.is_file()) >> 10


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python"
        f" {platform.python_version()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def main() -> int:
    """Soak, print the figures, and write soak.json unless --quick is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="soak.json is not written")
    chosen = parser.parse_args()
    about = {
        "command": f"soak.py --minutes {chosen.minutes:g} --seed {chosen.seed}",
        "seed": chosen.seed,
        **machine(),
    }
    with ExitStack() as ends:
        folder = ends.enter_context(tempfile.TemporaryDirectory(prefix="fedgpt-soak-"))
        with ExitStack() as lines:
            one = lines.enter_context(deployment(Path(folder) / "deployment", say=False))
            soak = Soak(one, chosen.seed, chosen.minutes)
            soak.make_sites(lines)
            soak.soak()
            soak.stop()
        about["load_average_at_the_end"] = [round(load, 1) for load in os.getloadavg()]
        figures = {**about, "minutes": round(soak.seconds / 60, 1), **soak.figures()}
    text = json.dumps(figures, indent=1) + "\n"
    print(text, end="")
    if not chosen.quick:
        Path(__file__).with_name("soak.json").write_text(text)
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
