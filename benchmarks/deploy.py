"""A job's trip over the network of a deployment, beyond the client's own work.

    python benchmarks/deploy.py            # about 6 minutes
    python benchmarks/deploy.py --quick    # a smoke run of one persistent client, about a minute

A server and one site on this machine, over TLS and through the guard (simulations/deploy). The
client has one job at a time, of one step. A trip lasts from the moment at which the server sends a
job to the one at which it accepts the update, as events.jsonl has them; the client's log has the
seconds of its own work, from a message that is read to a reply that is ready.

`trip_overhead_seconds`: the median trip less the median work, of a persistent client (fedgpt
client), with the nano model (5 MB). `trip_overhead_50mb_seconds`: with a model of 50 MB.
`stock_trip_seconds`: a whole trip of Flower's own SuperNode with the nano model, which starts a
Python process for each message. `question_seconds`: the client's first answer to a new run, in
which it tokenises its text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import child, machine

sys.path.insert(0, str(Path(__file__).parent.parent / "simulations" / "deploy"))
from deployment import Deployment, deployment

SITE = "north"
# another one, as the server may still count the persistent client with the first one's key
STOCK_SITE = "south"
SHORT = (
    *("pace.begin=1", "pace=buffer", "pace.clients=1", "local.steps=1", "local.batch_size=1"),
    *("evaluate=ends", "evaluate.tokens=1024", "evaluate.samples=0", "tokenizer.vocab_size=1024"),
    *("checkpoint.every=0", "model=nano", "runtime.threads=1"),
)
# float32 numbers of 50 MB
LARGE = ("model.n_layer=6", "model.n_head=6", "model.n_embd=408", "model.block_size=32")
WORK = re.compile(r": job \d+, .* in ([\d.]+) s$", re.MULTILINE)
ANSWER = re.compile(r": answered in ([\d.]+) s$", re.MULTILINE)


def trips(one: Deployment, *options: str) -> list[float]:
    """The seconds of each trip of a run but the first, in which the client builds its model."""
    code = one.start_server(*one.run_options(*SHORT, *options)).wait()
    assert code == 0, one.log("server")[-2000:]
    sent: dict[int, float] = {}
    found = []
    for line in (one.run_folder() / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "dispatch":
            sent[event["number"]] = event["seconds"]
        elif event["event"] == "accept":
            found.append(event["seconds"] - sent[event["number"]])
    return found[1:]


def work(one: Deployment, jobs: int) -> list[float]:
    """The seconds of the client's work in the newest `jobs` jobs."""
    return [float(seconds) for seconds in WORK.findall(one.log(SITE))[-jobs:]]


def overhead(one: Deployment, rounds: int, *options: str) -> float:
    """The median trip of a persistent client less its median work, in seconds."""
    found = trips(one, f"rounds={rounds}", *options)
    return statistics.median(found) - statistics.median(work(one, len(found)))


def stock_trips(one: Deployment, rounds: int) -> Sequence[float]:
    """The trips of Flower's SuperNode."""
    told = one.command(
        *("client", f"{STOCK_SITE}.kit", "--text", str(one.text(STOCK_SITE))),
        *("--state", "stock", "--stock"),
    )
    name, *words = shlex.split(next(line for line in told.splitlines() if line[:1] != "#"))
    programs = Path(sys.executable).parent  # Flower starts its other programs by name
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with child([programs / name, *words], one.folder / "logs" / "stock.log"):
        return trips(one, f"rounds={rounds}")


def main() -> None:
    """Measure, and print a table and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    quick = parser.parse_args().quick
    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="fedgpt-bench-") as folder,
        deployment(Path(folder) / "deployment", say=False) as one,
    ):
        one.write_texts()
        one.make_keys()
        one.start_client(SITE)
        figures["trip_overhead_seconds"] = overhead(one, 4 if quick else 30)
        figures["question_seconds"] = float(ANSWER.findall(one.log(SITE))[0])
        if not quick:
            figures["trip_overhead_50mb_seconds"] = overhead(one, 12, *LARGE)
            one.stop(SITE)
            figures["stock_trip_seconds"] = statistics.median(stock_trips(one, 4))
    print("| figure | seconds |\n|---|---|")
    for name, seconds in figures.items():
        print(f"| {name} | {seconds:.2f} |")
    print(json.dumps({**figures, **machine()}))


if __name__ == "__main__":
    main()
