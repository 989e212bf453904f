"""Clients come and go, links are cut, the server is killed: does every run end all the same?

    python simulations/deploy/soak.py --minutes 60     # writes soak.json
    python simulations/deploy/soak.py --minutes 3 --quick

A server takes one short run after the other for the given time. Meanwhile something happens every
few seconds, drawn with a seed: a client is stopped, killed or halted for some seconds (as if its
link was cut), the link or the ServerApp is killed, or the server itself, which is then started
again. At the end nothing happens any more, and the last run must end, too.

Of each run it is checked that it ended, that no update was accepted twice, and that each version
has its update. Memory and open files of the server's processes and of the clients are read every
few seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployment import SITES, Deployment, deployment, wait_until

from fedgpt.storage.run_folder import read_lines

VERSIONS = 60  # of each run
SMALL = (
    *("pace=buffer", "pace.clients=3", "pace.begin=1", f"rounds={VERSIONS}"),
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=2", "local.batch_size=2", "evaluate.tokens=1024", "evaluate.samples=0"),
    *("evaluate=ends", "tokenizer.vocab_size=300", "runtime.threads=1", "checkpoint.every=20"),
)
PAUSE = (4.0, 12.0)  # seconds between two disturbances, at least and at most
HALT = (2.0, 8.0)  # seconds for which a client is halted
END_SECONDS = 600.0  # for the last run, after the last disturbance
PROGRAMS = {"link": "fedgpt.flower.deploy.link", "serverapp": "flwr-serverapp"}


@dataclass
class Samples:
    """Memory and open files of processes, by the kind of process and the time."""

    rows: dict[str, list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def take(self, kind: str, pid: int) -> None:
        """Read a process, unless it has just ended."""
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:
            return
        kilobytes = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        self.rows[kind].append((time.monotonic(), int(kilobytes.split()[1]), files))

    def ends(self) -> dict[str, dict[str, float]]:
        """Median megabytes and files of each kind in the first and the last third of the time."""
        found = {}
        for kind, rows in sorted(self.rows.items()):
            third = max(1, len(rows) // 3)
            found[kind] = {
                "mb_first": statistics.median(row[1] for row in rows[:third]) / 1024,
                "mb_last": statistics.median(row[1] for row in rows[-third:]) / 1024,
                "files_first": statistics.median(row[2] for row in rows[:third]),
                "files_last": statistics.median(row[2] for row in rows[-third:]),
            }
        return found


class Soak:
    """A deployment that is disturbed."""

    def __init__(self, one: Deployment, seed: int):
        self.one, self.random = one, random.Random(seed)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples = Samples()

    def disturb(self) -> None:
        """Let one thing happen."""
        acts: list[Callable[[], None]] = [
            *(self._stop_client, self._kill_client, self._halt_client) * 3,
            *(self._kill_link, self._kill_serverapp, self._kill_server),
        ]
        act = self.random.choice(acts)
        self.counts[act.__name__.removeprefix("_")] += 1
        act()

    def start_missing(self) -> None:
        """Start what has ended: the server, and every client."""
        if "server" not in self.one.processes or self.one.processes["server"].poll() is not None:
            self.one.start_server()
        for site in SITES:
            if site not in self.one.processes or self.one.processes[site].poll() is not None:
                self.one.start_client(site)

    def look(self) -> None:
        """Read memory and open files."""
        for site in SITES:
            if site in self.one.processes:
                self.samples.take("client", self.one.processes[site].pid)
        for kind, program in PROGRAMS.items():
            for pid in self._pids(program):
                self.samples.take(kind, pid)

    def _some_client(self) -> str | None:
        running = [s for s in SITES if s in self.one.processes]
        return self.random.choice(running) if running else None

    def _stop_client(self) -> None:
        if (site := self._some_client()) is not None:
            self.one.stop(site)

    def _kill_client(self) -> None:
        if (site := self._some_client()) is not None:
            self.one.stop(site, signal.SIGKILL)

    def _halt_client(self) -> None:
        if (site := self._some_client()) is None:
            return
        process = self.one.processes[site]
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(*HALT))
        process.send_signal(signal.SIGCONT)

    def _kill_link(self) -> None:
        self._kill("link")

    def _kill_serverapp(self) -> None:
        self._kill("serverapp")

    def _kill_server(self) -> None:
        if "server" in self.one.processes:
            self.one.stop("server", signal.SIGKILL)

    def _kill(self, kind: str) -> None:
        for pid in self._pids(PROGRAMS[kind]):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)

    def _pids(self, program: str) -> Iterator[int]:
        """The processes of this deployment that run a program."""
        mine = str(self.one.server)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
                around = (path.parent / "environ").read_bytes()
            except OSError:
                continue
            if any(word.decode(errors="replace").endswith(program) for word in words[:4]) and (
                mine.encode() in around
            ):
                yield int(path.parent.name)


def checked(folder: Path) -> dict[str, Any]:
    """What a run that has ended has counted; `wrong` is what is not as it must be."""
    events = [e for e in read_lines(folder / "events.jsonl") if e["event"] == "accept"]
    updates = [(event["client"], event["number"]) for event in events]
    wrong = []
    if not (folder / "summary.json").exists():
        wrong.append("it has not ended")
    if len(set(updates)) != len(updates):
        wrong.append("an update was accepted twice")
    if len(updates) != VERSIONS:
        wrong.append(f"{len(updates)} updates in {VERSIONS} versions")
    return {"run": folder.name, "updates": len(updates), "wrong": wrong}


def soak(one: Deployment, minutes: float, seed: int) -> dict[str, Any]:
    """Disturb a deployment for some minutes; the figures."""
    one.write_texts()
    one.make_keys()
    soak = Soak(one, seed)
    soak.start_missing()
    began, submitted = time.monotonic(), 0
    next_act = began + 30
    while time.monotonic() < began + 60 * minutes:
        status = json.loads(one.command("status", "server", "--json"))
        if len(status["queue"]) < 1:
            submitted += 1
            one.command("submit", "server", *one.run_options(f"name=soak{submitted}", *SMALL))
        soak.look()
        if time.monotonic() > next_act:
            soak.disturb()
            next_act = time.monotonic() + soak.random.uniform(*PAUSE)
        soak.start_missing()
        time.sleep(1)

    def all_ended() -> bool:
        soak.start_missing()
        return len(json.loads(one.command("status", "server", "--json"))["ended"]) == submitted

    wait_until(all_ended, END_SECONDS, "the end of the last run")
    status = json.loads(one.command("status", "server", "--json"))
    runs = [checked(Path(run["run_dir"])) for run in status["ended"]]
    failed = [run for run in status["ended"] if run["exit_code"] != 0]
    return {
        "minutes": minutes,
        "seed": seed,
        "runs": len(runs),
        "updates": sum(run["updates"] for run in runs),
        "starts": sum(run["starts"] for run in status["ended"]),
        "disturbances": dict(soak.counts),
        "wrong": [run for run in runs if run["wrong"]] + failed,
        "processes": soak.samples.ends(),
    }


def main() -> int:
    """Soak, print the figures, and write soak.json unless --quick is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="soak.json is not written")
    chosen = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="fedgpt-soak-") as folder,
        deployment(Path(folder) / "deployment", say=False) as one,
    ):
        figures = soak(one, chosen.minutes, chosen.seed)
    print(json.dumps(figures, indent=1))
    if not chosen.quick:
        text = json.dumps(figures, indent=1) + "\n"
        Path(__file__).with_name("soak.json").write_text(text)
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
