"""`fedgpt server` with real clients: to the end, through crashes, stopped and continued."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.advice import advises
from support.deployment import deployment
from support.disk import largest_file
from support.here import SMALL
from support.metrics_text import parsed
from support.served import LINK, LONG, SERVER, Served, descendant, ended, reached, version_of
from support.sites import NAMES, Texts
from support.world import summary, wait_until

from fedgpt.api import run
from fedgpt.config.compose import load, to_yaml
from fedgpt.core.errors import FedGPTError, Interrupted
from fedgpt.flower.deploy import queue, supervise
from fedgpt.flower.deploy.control import Control
from fedgpt.flower.deploy.folder import read_server
from fedgpt.flower.deploy.link_process import LinkProcess
from fedgpt.flower.deploy.queue import Wish
from fedgpt.flower.deploy.supervise import ServerFailed, serving
from fedgpt.flower.processes import _alive, _descendants
from fedgpt.storage.run_folder import read_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # of flwr.cli
]
ROUNDS = 8
LONGER = [*(word for word in SMALL if not word.startswith("rounds=")), f"rounds={ROUNDS}"]
CRASHING = """
from dataclasses import dataclass

from fedgpt.aggregate.fedavg import FedAvg


@dataclass(frozen=True)
class Crashing(FedAvg):
    def step(self, D, state):
        raise RuntimeError("no step today")
"""
END = "        return super().step(D, state)\n"


@pytest.fixture
def served(tmp_path) -> Served:
    return Served(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    """The results of the longer run on the pool."""
    return run(*LONGER, f"run_dir={tmp_path_factory.mktemp('pool') / 'run'}").summary


def same(run_dir: Path, before: dict[str, Any]) -> None:
    """A run has the results of another, and no update was lost or counted twice."""
    now = summary(run_dir)
    assert now["weights_sha256"] == before["weights_sha256"]
    assert (now["tokens"], now["rejected"]) == (before["tokens"], {})


@pytest.mark.long
def test_one_command_runs_one_run_and_tells_how_it_goes(served, tmp_path):
    pool = run(*SMALL, f"run_dir={tmp_path / 'pool'}").summary
    with served.sites(), served.server(*SMALL) as server:
        wait_until(lambda: served.get("/health")[0] == 200, LONG)
        wait_until(lambda: served.status()["running"] is not None, LONG)
        running = served.status()
        assert running["serves"] and running["link"] and running["approved"] == ["north", "south"]
        assert running["running"]["number"] == 1 and running["running"]["versions"] == 3
        folder = Path(running["running"]["run_dir"])
        assert folder.parent == served.folder / "runs"
        metrics = parsed(served.get("/metrics")[1])
        assert metrics["fedgpt_link_up"] == {(): 1} and metrics["fedgpt_clients_approved"] == {
            (): 2
        }
        again = served.fedgpt("server", str(served.folder), "--status-port=0")
        assert again.returncode == 1 and "another server runs in this folder" in again.stderr
        advises(again.stderr.strip(), f"give it a run with: fedgpt submit {served.folder} OPTIONS")
        later = served.fedgpt("submit", str(served.folder), *SMALL)
        assert (later.returncode, later.stdout, later.stderr) == (0, "run 2\n", "")
        assert ended(server) == 0, served.log()
        same(folder, pool)
    log = served.log()
    assert "version 3/3" in log and "Traceback" not in log, "as `fedgpt run` prints it"
    after = served.status()
    assert not after["serves"] and not after["link"] and after["running"] is None
    assert [one["number"] for one in after["queue"]] == [2]
    (one,) = after["ended"]
    assert (one["exit_code"], one["starts"]) == (0, 1)
    assert one["progress"]["version"] == 3 and one["progress"]["accepted"] == 6
    acts = [(act["act"], act["run"]) for act in served.acts()]
    assert acts == [("submit", 1), ("start", 1), ("submit", 2), ("end", 1)]


@pytest.mark.long
def test_sites_have_their_own_text_and_are_known_by_the_names_in_their_kits(tmp_path):
    """Without TLS, on this machine alone, which is said."""
    texts = Texts.write(tmp_path)
    pool = texts.in_one_place(f"run_dir={tmp_path / 'pool'}")
    served, folder = Served(tmp_path, NAMES), tmp_path / "run"

    words = texts.at_sites(f"run_dir={folder}")
    with served.sites(texts.config, plain=True), served.server("--insecure", *words) as server:
        assert ended(server) == 0, served.log()
    same(folder, pool)
    accepted = [
        event for event in read_lines(folder / "events.jsonl") if event["event"] == "accept"
    ]
    assert {event["client"] for event in accepted} == set(NAMES)
    assert "NO ENCRYPTION" in served.log() and "without TLS" in served.log()


@pytest.mark.long
def test_a_run_goes_on_after_its_link_and_then_its_server_was_killed(served, undisturbed, tmp_path):
    folder = tmp_path / "run"
    with served.sites(), served.server(*LONGER, f"run_dir={folder}") as server:
        reached(folder, 1)
        os.kill(descendant(server, LINK), signal.SIGKILL)
        wait_until(lambda: served.log().count("the run is continued") == 1, LONG)
        reached(folder, version_of(folder) + 1)
        os.kill(descendant(server, SERVER), signal.SIGKILL)
        assert ended(server) == 0, served.log()
    same(folder, undisturbed)
    (one,) = served.status()["ended"]
    assert one["starts"] == 3 and one["progress"]["accepted"] == 2 * ROUNDS
    crashes = [act["reason"] for act in served.acts() if act["act"] == "crash"]
    assert crashes[0].startswith("the link ended")
    assert crashes[1] == "the server of the run was killed", "before Flower has noticed it"


@pytest.mark.long
def test_a_stopped_run_is_continued_by_the_same_command(served, undisturbed, tmp_path):
    folder = tmp_path / "run"
    words = [*LONGER, f"run_dir={folder}"]
    with served.sites():
        for sign in (signal.SIGTERM, signal.SIGINT):
            begun = version_of(folder)
            with served.server(*words) as server:
                reached(folder, begun + 2)
                server.send_signal(sign)
                assert ended(server) == 130, served.log()
            command = f"fedgpt server {served.folder} resume={folder}"
            assert f"interrupted; continue with: {command}" in served.log()
        with served.server(f"resume={folder}") as server:
            assert ended(server) == 0, served.log()
    same(folder, undisturbed)
    assert [one["exit_code"] for one in served.status()["ended"]] == [130, 130, 0]


@pytest.mark.long
def test_runs_of_the_queue_follow_each_other_and_outlive_their_server(served, tmp_path):
    """The second is refused by its server, and the third is stopped with it and continued."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "only.txt").write_text("Too short a text.\n")
    # only the server of the run reads the text
    short = ["corpus=files", f"corpus.path={tmp_path / 'text'}", *SMALL[1:]]
    queued = [SMALL, short, LONGER]
    for number, words in enumerate(queued, 1):
        done = served.fedgpt("submit", str(served.folder), *words)
        assert (done.returncode, done.stdout) == (0, f"run {number}\n"), done.stderr
        assert "no server runs" in done.stderr and f"fedgpt server {served.folder}" in done.stderr
    with served.sites():
        with served.server() as server:
            wait_until(lambda: served.status()["running"] is not None, LONG)
            metrics = parsed(served.get("/metrics")[1])
            assert metrics["fedgpt_queue_length"] == {(): 2}
            wait_until(lambda: (served.status()["running"] or {}).get("number") == 3, LONG)
            third = Path(served.status()["running"]["run_dir"])
            reached(third, 2)
            server.send_signal(signal.SIGTERM)
            assert ended(server) == 0, served.log()
        stopped = served.status()
        assert [one["exit_code"] for one in stopped["ended"]] == [0, 2]
        assert "1 documents are too few" in stopped["ended"][1]["reason"]
        assert "interrupted in run 3, which the next server here continues" in served.log()
        assert stopped["running"]["number"] == 3 and stopped["running"]["starts"] == 1
        with served.server() as server:
            done = served.fedgpt("submit", str(served.folder), "--wait", *SMALL)
            assert done.returncode == 0 and "version 3/3" in done.stdout, done.stderr
            assert [one["exit_code"] for one in served.status()["ended"]] == [0, 2, 0, 0]
            server.send_signal(signal.SIGTERM)
            assert ended(server) == 0
    assert summary(third)["versions"] == ROUNDS and summary(third)["rejected"] == {}


@pytest.mark.long
def test_a_run_that_is_cancelled_makes_place_for_the_next_and_can_be_continued(served, undisturbed):
    for name, words in (("one", LONGER), ("two", SMALL), ("three", SMALL)):
        queued = served.fedgpt("submit", str(served.folder), *words, f"name={name}")
        assert queued.returncode == 0, queued.stderr
    later = served.fedgpt("cancel", str(served.folder), "3")
    assert later.stdout == "three (run 3) will not begin\n", later.stderr
    with served.sites(), served.server() as server:
        wait_until(lambda: served.status()["running"] is not None, LONG)
        folder = Path(served.status()["running"]["run_dir"])
        reached(folder, 2)
        done = served.fedgpt("cancel", str(served.folder))
        told = (
            "one (run 1) stops, with a checkpoint if it has begun, unless it is complete already\n"
        )
        assert done.stdout == told, done.stderr
        wait_until(lambda: len(served.status()["ended"]) == 3, LONG)
        first, second, third = served.status()["ended"]
        assert [one["exit_code"] for one in (first, second, third)] == [130, 0, 130]
        assert third["reason"] == "cancelled before it began" and third["starts"] == 0
        again = ["submit", str(served.folder), f"resume={folder}"]
        advises(first["reason"], f"continue with: fedgpt submit {served.folder} resume={folder}")
        assert version_of(folder) < ROUNDS and not (folder / "summary.json").exists()
        assert served.fedgpt(*again).returncode == 0
        wait_until(lambda: len(served.status()["ended"]) == 4, LONG)
        server.send_signal(signal.SIGTERM)
        assert ended(server) == 0
    same(folder, undisturbed)
    assert "the next server here continues" not in served.log()


@pytest.mark.long
def test_nothing_outlives_a_server_that_was_killed_and_the_next_one_continues(served):
    queued = served.fedgpt("submit", str(served.folder), *SMALL)
    assert queued.returncode == 0
    with served.sites():
        with served.server() as server:
            wait_until(lambda: served.status()["running"] is not None, LONG)
            folder = Path(served.status()["running"]["run_dir"])
            reached(folder, 1)
            below = _descendants(server.pid)
            assert len(below) >= 4
            server.kill()
            wait_until(lambda: not any(map(_alive, below)), 60)
        assert not served.status()["serves"]
        with served.server() as server:
            wait_until(lambda: len(served.status()["ended"]) == 1, LONG)
    (one,) = served.status()["ended"]
    assert (one["exit_code"], one["starts"]) == (0, 2)
    assert one["progress"]["accepted"] == 6 and one["progress"]["rejected"] == {}


@pytest.mark.long
def test_a_run_that_comes_no_further_is_given_up_with_the_reason(served, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CRASHING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(supervise, "MOST_STARTS", 2)
    options = [word for word in SMALL if not word.startswith("strategy=")]
    options += ["strategy=custom", "strategy._target_=mine.Crashing", "trusted_packages=[mine]"]
    wish = Wish(load([*options, f"run_dir={tmp_path / 'run'}"]), dated=False, resumed=False)
    link = LinkProcess(served.folder, ["--host=127.0.0.1"])
    with served.sites(), serving(served.folder, link) as supervisor:
        one = queue.add(served.folder, wish, once=True)
        with pytest.raises(FedGPTError, match="started 2 times without a new version") as given_up:
            supervisor.carry_out(one)
        assert "no step today" in str(given_up.value)
        again = f"fedgpt server {served.folder} resume={tmp_path / 'run'}"
        advises(given_up.value, f"remove the cause and continue with: {again}")
        (tmp_path / "mine.py").write_text(
            CRASHING.replace("raise Runtime", "# raise Runtime") + END
        )
        supervisor.carry_out(queue.add(served.folder, replace(wish, resumed=True), once=True))
        # the control API, while the link is up
        with Control(served.folder) as control:
            assert control.healthy() and len(control.online()) == 2
            number = control.submit(wish.options)
            assert not control.status(number).finished
            control.stop(number)
            assert (control.status(number).how, control.status(number).completed) == (
                "stopped",
                False,
            )
            control.stop(number)  # it stays as it is
            with pytest.raises(FedGPTError, match="12345"):
                control.status(12345)
    assert [run.exit_code for run in queue.runs(served.folder)] == [1, 0]
    assert summary(tmp_path / "run")["rejected"] == {}


def test_a_run_whose_own_server_was_killed_is_recorded_so(tmp_path):
    folder = deployment(tmp_path).folder
    wish = Wish(load([*SMALL, f"run_dir={tmp_path / 'run'}"]), dated=False, resumed=False)
    queue.add(folder, wish, once=True)
    queue.add(folder, wish)
    with serving(folder, LinkProcess(folder)):
        own, queued = queue.runs(folder)
    assert own.exit_code == 1 and queued.waits
    assert own.reason == "its server was killed before it began"
    queue.add(folder, wish, once=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(wish.options))
    with serving(folder, LinkProcess(folder)):
        own = queue.read(folder, 3)
    again = f"fedgpt server {folder} resume={tmp_path / 'run'}"
    advises(own.reason, f"its server was killed; continue with: {again}")


def test_a_server_that_cannot_start_its_link_or_write_its_folder_ends(tmp_path):
    served = Served(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", read_server(served.folder).port))
        taken.listen()
        with served.server(*SMALL) as server:
            assert ended(server) == 1
    assert "cannot listen on 127.0.0.1" in served.log()
    assert "the link cannot be started: it ended with exit code 1" in served.log()
    (one,) = served.status()["ended"]
    assert one["exit_code"] == 1 and not (served.folder / "runs").exists()
    wish = Wish(load([*SMALL, f"run_dir={tmp_path / 'run'}"]), dated=False, resumed=False)
    run = queue.add(served.folder, wish)
    with (
        serving(served.folder, LinkProcess(served.folder)) as supervisor,
        largest_file(20),
        pytest.raises(ServerFailed, match=r"queue/2\.json cannot be written"),
    ):
        supervisor.carry_out(run)


def test_a_run_that_is_stopped_before_it_began_leaves_no_folder(tmp_path):
    folder = deployment(tmp_path).folder
    wish = Wish(load([*SMALL, f"run_dir={tmp_path / 'run'}"]), dated=False, resumed=False)
    with serving(folder, LinkProcess(folder)) as supervisor:
        os.kill(os.getpid(), signal.SIGTERM)
        assert supervisor.stopped
        with pytest.raises(Interrupted, match="before the run began"):
            supervisor.carry_out(queue.add(folder, wish, once=True))
        supervisor.serve()  # ends at once
    assert not (tmp_path / "run").exists()
    assert queue.read(folder, 1).exit_code == 130
