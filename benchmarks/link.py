"""A vector's trip through a server's link, without a model: seconds, CPU and memory.

    python benchmarks/link.py            # 5, 50 and 500 MB, about 5 minutes on a quiet machine
    python benchmarks/link.py --quick    # a smoke run with 5 MB

The link, a ServerApp and a persistent client are processes on this machine, as `fedgpt server` and
`fedgpt client` start them, over TLS and through the guard (simulations/deploy). The client answers
each vector with one of the same size (benchmarks/echo_apps.py), so that what is measured is the way
of a message alone: with training, the client's model, gradient and moments come on top.

For each size: the median trip without the client's work; `floor`, a plain PUT and GET of the same
bytes over TLS in the same run (benchmarks/plain_https.py); the CPU seconds of a trip of the three
processes; and the peak of each process's resident set (VmHWM) less what it was before, in vectors.
At the server that is its own vector and the reply, at the client the vector and its answer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import TICK, child, machine
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.fab import Fab
from memory import high_water
from plain_https import there_and_back

from fedgpt.flower.deploy.control import Control
from fedgpt.flower.deploy.link_process import LinkProcess
from fedgpt.flower.run_config import APP

sys.path.insert(0, str(Path(__file__).parent.parent / "simulations" / "deploy"))
from deployment import Deployment, deployment

HERE = Path(__file__).parent
SITE = "north"
SIZES = {5_000_000: 20, 50_000_000: 8, 500_000_000: 2}  # bytes of a vector -> number of trips
WAIT_SECONDS = 1800.0


def measured(one: Deployment, link: int, client: int, size: int, rounds: int) -> dict[str, Any]:
    """The figures of the trips of a vector of `size` bytes; the first trip counts for the peak."""
    out = one.folder / f"trips-{size}.jsonl"
    processes = {"link": link, "client": client}
    idle = {name: reset_peak(pid) for name, pid in processes.items()}
    start(one.server, {"out": str(out), "numbers": size // 4, "rounds": rounds + 1})
    wait(out, 1)
    before = {name: own_cpu_seconds(pid) for name, pid in processes.items()}
    lines = wait(out, rounds + 1)
    cpu = {name: (own_cpu_seconds(pid) - before[name]) / rounds for name, pid in processes.items()}
    cpu["server"] = statistics.mean(line["cpu"] for line in lines[1:])
    peak = {name: (high_water(pid) - idle[name]) / size for name, pid in processes.items()}
    peak["server"] = (lines[-1]["peak"] - lines[-1]["idle"]) / size
    with floor_server(one, size) as url:
        floor = statistics.median(
            there_and_back(url, str(one.server / "ca.pem"), size) for _ in range(rounds)
        )
    return {
        "seconds": round(statistics.median(line["seconds"] for line in lines[1:]), 3),
        "floor_seconds": round(floor, 3),
        **{f"cpu_seconds_{name}": round(value, 3) for name, value in sorted(cpu.items())},
        **{f"peak_vectors_{name}": round(value, 2) for name, value in sorted(peak.items())},
    }


def start(folder: Path, config: Mapping[str, str | int]) -> None:
    """Submit a run of the echo apps to the link of a server's folder."""
    app = APP + "".join(f"{name} = {json.dumps(type(value)())}\n" for name, value in config.items())
    app = re.sub('serverapp = ".*"', 'serverapp = "echo_apps:server"', app)
    files = {"pyproject.toml": app.encode(), "echo_apps.py": HERE / "echo_apps.py"}
    request = StartRunRequest(
        fab=fab_to_proto(Fab("", build_fab_from_files(files)[0], {})),
        override_config=user_config_to_proto(dict(config)),
        federation=NOOP_FEDERATION_ID,
    )
    with Control(folder) as control:
        control.api.StartRun(request)


def wait(out: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` lines of a file, once they are there."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        lines = out.read_text().splitlines() if out.exists() else []
        if len(lines) >= count:
            return [json.loads(line) for line in lines[:count]]
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(lines)} of {count} trips after {WAIT_SECONDS:.0f} s")
        time.sleep(0.05)


def reset_peak(pid: int) -> int:
    """Let the kernel's peak of the resident set begin again; returns its size now, in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return high_water(pid)


def own_cpu_seconds(pid: int) -> float:
    """CPU seconds of a process without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@contextmanager
def floor_server(one: Deployment, size: int) -> Iterator[str]:
    """The address of a plain HTTPS server with the certificate of the link."""
    files = [str(one.server / name) for name in ("server.pem", "server.key")]
    command = [sys.executable, str(HERE / "plain_https.py"), *files, str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"https://localhost:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def main() -> None:
    """Measure, and print a table and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run with the smallest vector")
    sizes = dict(list(SIZES.items())[:1]) if parser.parse_args().quick else SIZES
    about, figures = machine(), {}
    with (
        tempfile.TemporaryDirectory(prefix="fedgpt-bench-") as folder,
        deployment(Path(folder) / "deployment", say=False) as one,
    ):
        one.make_keys()
        os.environ |= LinkProcess(one.server).environment
        logs = one.folder / "logs"
        link_command = ["-m", "fedgpt.flower.deploy.link", str(one.server), "--host", "127.0.0.1"]
        with child(link_command, logs / "link.log") as link:
            with Control(one.server) as control:
                while link.poll() is None and not control.healthy():
                    time.sleep(0.2)
            client_command = [HERE / "echo_apps.py", one.folder / f"{SITE}.kit"]
            with child(client_command, logs / "client.log") as client:
                with Control(one.server) as control:
                    while client.poll() is None and not control.online():
                        time.sleep(0.2)
                for size, rounds in sizes.items():
                    figures[size // 1_000_000] = measured(one, link.pid, client.pid, size, rounds)
    names = list(figures[5])
    print(f"| MB | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for size, values in figures.items():
        print(f"| {size} | {' | '.join(str(values[name]) for name in names)} |")
    flat = {
        f"{name}_{size}mb": value for size, row in figures.items() for name, value in row.items()
    }
    print(json.dumps({**flat, **about}))


if __name__ == "__main__":
    main()
