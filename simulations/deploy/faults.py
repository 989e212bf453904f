"""What do faults and attacks cost a deployment? The client that they hit some time, others nothing.

    python simulations/deploy/faults.py            # half an hour; writes results.json
    python simulations/deploy/faults.py --quick    # a smoke run

A server and three sites have one asynchronous run over TLS. One thing after another happens to it:
processes are killed and stopped, links are cut and slowed down, the disk of a site is full, a site
sends rubbish, and somebody attacks the port. The site `west` is the one that is hit, or attacks; it
has a network of its own where root and iproute2 allow.

| figure | what it is |
|---|---|
| back | seconds from the fault until an update of the site, or of any one, is accepted again |
| waited | most seconds that `north` or `south` had from one accepted update to the next, without |
|        | the training: what somebody else's fault has held up shows here |
| memory | MB by which the link and the server of the run grew at most |
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from deployment import SITES, Deployment, deployment
from network import Line, Namespace, namespace, why_not

from fedgpt.client.limits import LEAST_FREE
from fedgpt.storage.run_folder import read_lines

STUDY = Path(__file__).parent
sys.path.insert(0, str(STUDY.parent))
from common import table, write_results

OPTIONS = (
    *("pace=buffer", "pace.clients=3", "pace.begin=2", "rounds=100000", "name=faults"),
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=40", "local.batch_size=4", "evaluate.tokens=1024", "evaluate.samples=0"),
    *("evaluate=ends", "tokenizer.vocab_size=300", "runtime.threads=1", "checkpoint.every=200"),
)
VICTIM, HONEST = "west", ("north", "south")
LINK, SERVER = "fedgpt.flower.deploy.link", "flwr-serverapp"
DISK = 64 << 20  # bytes that the site writes before its disk is down to what it leaves free
MOST = 400.0  # seconds for which anything is waited for
MOST_WAITED = 2.0  # seconds that a fault of another may add to the longest undisturbed wait
MOST_MEMORY = 50.0  # MB by which requests without credentials may let a process grow
SLOW = Line(rate=40, delay=50, loss=1)


class Study:
    """A deployment with a run, and what happened to it."""

    def __init__(self, one: Deployment, network: Namespace | None, quick: bool):
        self.one, self.network, self.quick = one, network, quick
        self.rows: list[dict[str, Any]] = []
        self.attacks: list[tuple[str, str]] = []
        self.seen: list[tuple[str, int]] = []  # the accepted updates when they were last looked at
        self.lost = 0

    # ---- what the run's folder says

    def events(self) -> list[dict[str, Any]]:
        """The events of the run; none before it has begun."""
        with suppress(ValueError, OSError):
            return list(read_lines(self.one.run_folder() / "events.jsonl"))
        return []

    def accepted(self, client: str = "") -> list[dict[str, Any]]:
        """The accepted updates, of one client or of all."""
        return [
            event
            for event in self.events()
            if event["event"] == "accept" and client in ("", event["client"])
        ]

    def next_update(self, *clients: str) -> float:
        """Seconds until each of the clients, or anybody, has one more accepted update."""
        began = time.monotonic()
        for client in clients or ("",):
            count = len(self.accepted(client))
            self.until(lambda c=client, n=count: len(self.accepted(c)) > n, f"an update {client}")
        return time.monotonic() - began

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something holds; an error that names the logs if it never does."""
        deadline = time.monotonic() + MOST
        while not condition():
            if time.monotonic() > deadline:
                sys.exit(f"{what} did not come in {MOST:.0f} s; see {self.one.folder / 'logs'}")
            time.sleep(0.5)  # the events of a run are many to read

    @contextmanager
    def measured(self, name: str, memory: bool = False) -> Iterator[dict[str, Any]]:
        """A row of the table: what is seen while the block runs and until all are well again."""
        row: dict[str, Any] = {"fault": name}
        print(f"{name} ...", flush=True)
        before = {client: len(self.accepted(client)) for client in HONEST}
        rejected = len(self._of("reject"))
        processes = self.memory_before() if memory else {}
        yield row
        if memory:
            row["memory_mb"] = round(self.memory_after(processes), 1)
        self.next_update(*HONEST)
        row["waited"] = round(
            max(self._longest_wait(client, count) for client, count in before.items()), 2
        )
        codes = [event["code"] for event in self._of("reject")[rejected:]]
        row["rejected"] = dict(Counter(codes))
        self._look()
        self.rows.append(row)
        print(f"  {row}", flush=True)

    def _of(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events() if event["event"] == name]

    def _longest_wait(self, client: str, first: int) -> float:
        """Most seconds between two accepted updates of a client without its training."""
        updates = self.accepted(client)[max(0, first - 1) :]
        return max(
            after["seconds"] - before["seconds"] - after["train_seconds"]
            for before, after in itertools.pairwise(updates)
        )

    def _look(self) -> None:
        """Count updates that were accepted once and are not any more."""
        now = [(event["client"], event["number"]) for event in self.accepted()]
        self.lost += len(set(self.seen) - set(now))
        self.seen = now

    # ---- the processes of the server

    def memory_before(self) -> dict[int, float]:
        """MB of the link and the server of the run, whose peaks are forgotten."""
        found = {}
        for pid in [*self.one.pids(LINK), *self.one.pids(SERVER)]:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
            found[pid] = _megabytes(pid, "VmRSS")
        return found

    def memory_after(self, before: dict[int, float]) -> float:
        """MB by which the peak of a process is above what it had."""
        return max(_megabytes(pid, "VmHWM") - had for pid, had in before.items())

    def kill(self, program: str) -> None:
        """kill -9 of a process of the server."""
        for pid in self.one.pids(program):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ---- the site that is hit

    def start(self, wait: bool = True) -> float:
        """Start the client; seconds until an update of it is accepted."""
        count, began = len(self.accepted(VICTIM)), time.monotonic()
        self.one.start_client(VICTIM)
        if wait:
            self.until(lambda: len(self.accepted(VICTIM)) > count, f"an update of {VICTIM}")
        return round(time.monotonic() - began, 1)

    def down(self, by: int = signal.SIGTERM) -> None:
        """Stop the client, if it runs."""
        if VICTIM in self.one.processes:
            self.one.stop(VICTIM, by)

    def attack(self, what: str, *more: str) -> list[tuple[str, str]]:
        """Attack from the site's network; (attack, answer) of each."""
        host = "localhost" if self.network is None else self.network.host
        words = [str(STUDY / "attacks.py"), host, str(self.one.port), "server/ca.pem", what, *more]
        inside = self.one.inside.get(VICTIM, lambda *command: list(command))
        done = subprocess.run(
            inside(sys.executable, *words),
            cwd=self.one.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"attacks.py {what}: {done.stderr[-2000:]}")
        found = [(attack, answer) for attack, answer in map(json.loads, done.stdout.splitlines())]
        self.attacks += found
        print("\n".join(f"  {attack}: {answer}" for attack, answer in found), flush=True)
        return found


def _megabytes(pid: int, name: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


# ---- faults, in the order in which they happen; each adds a row


def undisturbed(study: Study) -> None:
    with study.measured("nothing"):
        time.sleep(3 if study.quick else 20)


def begin_with_a_client_that_dies(study: Study) -> None:
    """The run is submitted, and the site is killed when it is asked who it is."""
    one, began = study.one, time.monotonic()
    one.command("submit", "server", *one.run_options(*OPTIONS))
    deadline = time.monotonic() + MOST
    while "a run asks who this is" not in one.log(VICTIM) and time.monotonic() < deadline:
        time.sleep(0.01)
    one.stop(VICTIM, signal.SIGKILL)
    row = {"answered": "answered in" in one.log(VICTIM)}
    study.until(lambda: len(study.accepted()) > 2, "the first updates")
    begun = round(time.monotonic() - began, 1)
    row |= {"fault": "client killed while it is asked who it is", "begun": begun}
    row["back"] = study.start()
    study.rows.append(row)
    print(f"{row}", flush=True)


def client_killed_in_a_job(study: Study) -> None:
    with study.measured("client killed in a job, started again after 2 s") as row:
        study.down(signal.SIGKILL)
        time.sleep(2)
        row["back"] = study.start()


def client_stopped(study: Study) -> None:
    with study.measured("client stopped and started") as row:
        study.down()
        row["back"] = study.start()


def serverapp_killed(study: Study) -> None:
    with study.measured("server of the run killed") as row:
        study.kill(SERVER)
        row["back"] = round(study.next_update(), 1)
        study.next_update(VICTIM)


def link_killed(study: Study) -> None:
    with study.measured("link killed") as row:
        study.kill(LINK)
        row["back"] = round(study.next_update(), 1)
        study.next_update(VICTIM)


def _cut(study: Study, seconds: float) -> None:
    name = f"link of a site down for {seconds:.0f} s"
    if (network := study.network) is None:
        study.rows.append({"fault": name, "skipped": why_not()})
        return
    with study.measured(name) as row:
        network.cut()
        time.sleep(seconds)
        network.join()
        row["back"] = round(study.next_update(VICTIM), 1)


def link_down(study: Study) -> None:
    _cut(study, 30)


def link_down_longer(study: Study) -> None:
    _cut(study, 80)


def slow_uplink(study: Study) -> None:
    name = f"uplink of {SLOW.rate} kbit/s"
    if (network := study.network) is None:
        study.rows.append({"fault": name, "skipped": why_not()})
        return
    with study.measured(name) as row:
        row["network"] = network.slow(SLOW)
        study.next_update(VICTIM)  # it may have been on its way before
        row["back"] = round(study.next_update(VICTIM), 1)
        network.free()
    study.next_update(VICTIM)


def empty_state(study: Study) -> None:
    with study.measured("empty state folder, as on another machine") as row:
        study.down()
        for folder in ("state", "cache"):
            shutil.rmtree(study.one.folder / folder / VICTIM)
        row["back"] = study.start()
        metrics = read_lines(study.one.run_folder() / "metrics.jsonl")
        row["state_lost"] = sum(line.get("state_lost", 0) for line in metrics)


def two_with_one_kit(study: Study) -> None:
    with study.measured("a second client with one kit") as row:
        words = study.one.site_words(VICTIM)
        words[words.index(f"state/{VICTIM}")] = "state/twin"
        study.one.inside["twin"] = study.one.inside.get(VICTIM, lambda *command: list(command))
        twin = study.one.start("twin", "client", *words)
        study.until(lambda: twin.poll() is not None, "the end of the second client")
        row["exit_code"] = study.one.stop("twin")
        row["said"] = study.one.log("twin").splitlines()[-1].partition("fedgpt: ")[2]
        study.next_update(VICTIM)


def full_disk(study: Study) -> None:
    name = "disk of a site filled while it works (tmpfs)"
    if os.geteuid() != 0:
        study.rows.append({"fault": name, "skipped": "mounting a file system needs root"})
        return
    folder = study.one.folder / "state" / VICTIM
    with study.measured(name) as row, ExitStack() as stack:
        study.down()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={LEAST_FREE + DISK}", "none", str(folder)]
        subprocess.run(mount, check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True)
        study.start()
        count = len(study._of("reject"))
        (folder / "filled").write_bytes(bytes(DISK))
        study.until(lambda: len(study._of("reject")) > count, "a rejection")
        row["said"] = study._of("reject")[count]["detail"]
        study.down()
        study.start(wait=False)  # it says at the start what is wrong
        study.until(lambda: study.one.processes[VICTIM].poll() is not None, "the client's end")
        told = [line for line in study.one.log(VICTIM).splitlines() if "make room there" in line]
        row["client"] = told[-1].replace(str(study.one.folder), "FOLDER")
        study.down()


def _misbehave(study: Study, deeds: list[str]) -> None:
    """Let the client of the site be one that misbehaves."""
    study.down()
    words = [*study.one.site_words(VICTIM), ",".join(deeds)]
    study.one.start_program(VICTIM, str(STUDY / "insider.py"), *words)


def bad_updates(study: Study) -> None:
    deeds = ["damaged"] if study.quick else ["nan", "damaged", "old", "repeats", "records"]
    with study.measured(f"a site sends: {', '.join(deeds)}", memory=True) as row:
        count = len(study._of("reject"))
        _misbehave(study, deeds)
        study.until(lambda: len(study._of("reject")) >= count + len(deeds), "the rejections")
        found = study._of("reject")[count:]
        row["said"] = "; ".join(f"{event['code']}: {event['detail']}" for event in found)
        study.down()


def broken_off(study: Study) -> None:
    """The server notices it after three minutes (tests/flower/test_fetch.py)."""
    with study.measured("a reply announced and broken off") as row:
        count = len(study.accepted(VICTIM))
        _misbehave(study, ["broken"])
        study.until(lambda: len(study.accepted(VICTIM)) > count, "the honest reply")
        before = len(study.accepted())
        time.sleep(30)
        row["updates_of_others"] = len(study.accepted()) - before
        study.down()
        row["back"] = study.start()  # once the server has noticed


# ---- attacks


def of_a_stranger(study: Study) -> None:
    with study.measured("requests of a stranger", memory=True):
        study.attack("stranger")


def of_bodies(study: Study) -> None:
    with study.measured("bodies of 300 MB and 1 GB without credentials", memory=True):
        study.attack("bodies")


def of_a_site(study: Study) -> None:
    with study.measured("200 half-open connections; forged requests of a site", memory=True):
        study.down()
        if not study.quick:
            study.attack("silence", "--kit", f"{VICTIM}.kit")
        ids = json.dumps(_job_of(study, HONEST[0]))
        study.attack("site", "--kit", f"{VICTIM}.kit", "--ids", ids)


def _job_of(study: Study, client: str) -> dict[str, Any]:
    """The ids of a job of a client and of its node, as the server's folder has them."""
    nodes = json.loads((study.one.server / "nodes.json").read_text())
    node = next(int(node) for node, name in nodes.items() if name == client)
    found: list[Any] = []

    def looked() -> bool:
        with sqlite3.connect(f"file:{study.one.server / 'link.db'}?mode=ro", uri=True) as state:
            asked = "SELECT message_id, dst_node_id FROM message_ins"
            found[:] = [one for one, of in state.execute(asked) if of % (1 << 64) == node]
        return bool(found)

    study.until(looked, f"a job of {client}")
    return {"node": node, "message": found[-1]}


def open_key(study: Study) -> None:
    with study.measured("a kit that others can read") as row:
        study.down()
        kit = study.one.folder / f"{VICTIM}.kit"
        kit.chmod(0o644)
        client = study.one.start_client(VICTIM)
        study.until(lambda: client.poll() is not None, "the end of the client")
        row["exit_code"] = study.one.stop(VICTIM)
        row["said"] = study.one.log(VICTIM).splitlines()[-1].partition("fedgpt: ")[2]
        kit.chmod(0o600)


def afterwards(study: Study) -> None:
    """The site, whose client is honest again."""
    with study.measured("the client after all of it") as row:
        study.down()
        row["back"] = study.start()


CASES: tuple[Callable[[Study], None], ...] = (
    *(undisturbed, of_bodies, of_a_stranger, slow_uplink, bad_updates, of_a_site, open_key),
    *(full_disk, afterwards, client_killed_in_a_job, link_down, serverapp_killed, link_killed),
    *(client_stopped, empty_state, broken_off, link_down_longer, two_with_one_kit),
)
QUICK = (undisturbed, client_stopped, bad_updates, of_a_stranger, of_a_site)


def at_the_end(study: Study) -> dict[str, Any]:
    """The figures of the whole run, after its server was stopped."""
    study._look()
    code = study.one.stop("server")
    updates = [(event["client"], event["number"]) for event in study.accepted()]
    metrics = read_lines(study.one.run_folder() / "metrics.jsonl", "version")
    rejected = Counter(event["code"] for event in study._of("reject"))
    return {
        "exit_code": code,
        "updates": len(updates),
        "versions": max(line["version"] for line in metrics),
        "lost": study.lost,
        "twice": len(updates) - len(set(updates)),
        "rejected": dict(rejected),
        "honest_rejected": sum(event["client"] in HONEST for event in study._of("reject")),
        "honest_quarantined": sum(event["client"] in HONEST for event in study._of("quarantine")),
    }


def problems(study: Study, end: dict[str, Any]) -> list[str]:
    """What is not as it must be, in words."""
    found = [f"{name}: {end[name]}" for name in ("lost", "twice", "exit_code") if end[name]]
    found += [f"{name}: {end[name]}" for name in ("honest_rejected", "honest_quarantined")]
    found = [one for one in found if not one.endswith(": 0")]
    if end["versions"] != end["updates"]:
        found.append(f"{end['updates']} updates in {end['versions']} versions")
    usual = next(row["waited"] for row in study.rows if row["fault"] == "nothing")
    server = ("server of the run killed", "link killed")
    for row in study.rows:
        # a smoke run is too short, and its machine perhaps too busy, to judge times
        judged = row["fault"] not in server and not study.quick
        if judged and row.get("waited", 0) > usual + MOST_WAITED:
            found.append(f"{row['fault']}: others waited {row['waited']} s")
        if row.get("memory_mb", 0) > MOST_MEMORY and "a site sends" not in row["fault"]:
            found.append(f"{row['fault']}: {row['memory_mb']} MB more memory")
    found += [f"{attack}: {answer}" for attack, answer in study.attacks if "accepted" in answer]
    return found


def shown(faults: list[dict[str, Any]], attacks: list[tuple[str, str]]) -> str:
    """The tables of what happened, as the page of the study has them."""
    rows = []
    for row in faults:
        figures = [row.get(name) for name in ("back", "waited", "memory_mb")]
        cells = ["" if figure is None else str(figure) for figure in figures]
        codes = ", ".join(f"{count} {code}" for code, count in row.get("rejected", {}).items())
        rows.append((row["fault"], *cells, row.get("skipped") or row.get("said") or codes))
    head = ("fault", "back, s", "others waited, s", "memory, MB", "what was said")
    return f"{table(head, rows)}\n\n{table(('attack', 'answer'), attacks)}"


def study_of(folder: Path, quick: bool) -> tuple[Study, dict[str, Any]]:
    """Let everything happen to a deployment in a new folder."""
    with ExitStack() as stack:
        reason = why_not()
        network = None if reason else stack.enter_context(namespace())
        one = stack.enter_context(deployment(folder, say=False))
        if network is not None:
            one.inside[VICTIM] = network.inside
        one.write_texts()
        one.make_keys(*([network.host] if network is not None else []))
        study = Study(one, network, quick)
        for site in SITES:
            one.start_client(site)
        one.start_server()
        begin_with_a_client_that_dies(study)
        for case in QUICK if quick else CASES:
            case(study)
        return study, at_the_end(study) | {"no_network": reason}


def main() -> int:
    """Run it all, print the tables, and write results.json unless --quick is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="results.json is not written")
    parser.add_argument("--folder", type=Path, help="a folder that does not exist yet, to keep")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # all processes end, too
    began, load = time.monotonic(), os.getloadavg()[0]
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="fedgpt-faults-")) / "deployment"
    study, end = study_of(folder, chosen.quick)
    wrong = problems(study, end)
    print(f"\n{shown(study.rows, study.attacks)}\n\n{json.dumps(end)}")
    print("\n".join(wrong) or "nothing lost, nothing counted twice, nobody held up")
    if not chosen.quick:
        figures = {
            **{"problems": wrong, "end": end, "faults": study.rows, "attacks": study.attacks},
            **{"options": OPTIONS, "load_average": [load, *os.getloadavg()[:1]]},
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        write_results(STUDY, [0], figures, "faults.py")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
