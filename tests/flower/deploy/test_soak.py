"""The soak of simulations/deploy: three minutes of it, and that it finds what it looks for."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.world import wait_until

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"
sys.path.insert(0, str(SIMULATION))
import growth  # noqa: E402
from applied import Applied  # noqa: E402
from deployment import free_port  # noqa: E402
from growth import Growth, processes_in  # noqa: E402
from line import Line  # noqa: E402

GROWS = """
import time
kept = []
for _ in range(600):
    kept.append(bytearray(1 << 20))
    time.sleep(0.02)
"""
SECONDS = 60.0  # bounds every wait


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_lost_or_grows_in_three_minutes_of_everything():
    """Each disturbance happens once at least."""
    command = [sys.executable, str(SIMULATION / "soak.py"), "--minutes", "3", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["wrong"] == [] and figures["runs"] >= 1
    assert figures["updates_applied"] == figures["versions"]
    assert figures["journals_compared"] >= 1
    assert figures["processes"]["client"]["in_its_life"]["compared"] >= 1


def run_of(folder: Path, updates: list[tuple[str, int]]) -> Path:
    """The files of a run that has ended, with a version of each update."""
    folder.mkdir(exist_ok=True)
    events: list[dict[str, Any]] = []
    for version, (client, number) in enumerate(updates, 1):
        events.append({"event": "accept", "client": client, "number": number})
        events.append({"event": "version", "version": version})
    lines = [{"version": version, "accepted": 1} for version in range(1, len(updates) + 1)]
    for name, records in (("events", events), ("metrics", lines)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "summary.json").write_text("{}")
    return folder


GOOD = [("a", 0), ("b", 0), ("a", 1)]


def test_a_run_without_a_fault_has_no_problem(tmp_path):
    applied = Applied()
    for updates in (GOOD, GOOD[:1], GOOD):  # a restart writes the last ones again
        applied.look(run_of(tmp_path / "run", updates))
    assert applied.problems(tmp_path / "run", 3) == []
    assert applied.figures()["updates_applied"] == 3


@pytest.mark.parametrize(
    "updates, problem",
    [
        ([*GOOD[:2], GOOD[0]], "applied twice"),
        (GOOD[:2], "2 updates, 2 of them in 3 versions"),
        (GOOD[:2], "applied once, and not at the end: [('a', 1)]"),
        ([GOOD[0], GOOD[2], GOOD[1]], "the updates changed"),
    ],
)
def test_an_update_that_is_lost_repeated_or_exchanged_is_found(tmp_path, updates, problem):
    applied = Applied()
    applied.look(run_of(tmp_path / "run", GOOD))
    found = applied.problems(run_of(tmp_path / "run", updates), 3)
    assert any(problem in one for one in found), found


def test_a_process_that_grows_is_found_and_this_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "WARM_SECONDS", 0.5)
    monkeypatch.setattr(growth, "WINDOW_SECONDS", 0.5)
    still = "import time; time.sleep(600)"
    with (
        subprocess.Popen([sys.executable, "-c", GROWS], cwd=tmp_path) as grows,
        subprocess.Popen([sys.executable, "-c", still], cwd=tmp_path) as stays,
    ):
        looks = Growth(tmp_path)

        def found() -> bool:
            looks.look()
            return bool(looks.wrong())

        try:
            wait_until(found, SECONDS)
            assert all("mb grew" in one for one in looks.wrong())
            assert {one.pid for one in processes_in(tmp_path)} == {grows.pid, stays.pid}
            assert looks.figures()["-c"]["most_at_once"] == 2
        finally:
            grows.kill()
            stays.kill()


def test_a_process_that_ends_while_it_is_looked_at_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "sample_of", lambda pid: None)
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path
    ) as one:
        looks = Growth(tmp_path)
        wait_until(lambda: list(processes_in(tmp_path)), SECONDS)
        looks.look()
        one.kill()
    assert looks.figures() == {} and looks.wrong() == []


def test_a_line_that_is_cut_keeps_what_comes_until_it_is_mended():
    with socket.create_server(("127.0.0.1", 0)) as server:
        line = Line(port := free_port(), server.getsockname()[1])
        with line.opened(), socket.create_connection(("127.0.0.1", port)) as near:
            far, _ = server.accept()
            with far:
                for one in (near, far):
                    one.settimeout(SECONDS)
                near.sendall(b"there")
                assert far.recv(9) == b"there"
                line.cut()
                near.sendall(b"again")
                far.sendall(b"back")
                near.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    near.recv(9)
                line.mend()
                near.settimeout(SECONDS)
                assert (far.recv(9), near.recv(9)) == (b"again", b"back")


def test_a_line_to_a_server_that_is_down_ends_the_connection():
    line = Line(port := free_port(), free_port())
    with line.opened(), socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as near:
        assert near.recv(9) == b""
