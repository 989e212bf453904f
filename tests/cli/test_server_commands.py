"""`fedgpt server`, `submit`, `cancel` and `status`: what they refuse, and what they say without a
server.
"""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.advice import advises
from support.deployment import deployment
from support.here import SMALL, tiny_run
from support.link import free_port
from support.metrics_text import parsed

from fedgpt import cli
from fedgpt.config.compose import from_yaml, load, to_yaml
from fedgpt.flower.deploy import folder as server_folder
from fedgpt.flower.deploy import queue
from fedgpt.flower.deploy.link_process import LinkProcess
from fedgpt.flower.deploy.monitor import CONTENT_TYPE, monitored
from fedgpt.flower.deploy.supervise import serving


@pytest.fixture
def folder(tmp_path) -> Path:
    return deployment(tmp_path, "north", "south").folder


@pytest.fixture
def typed(capsys):
    """Type a command: the exit code, stdout and stderr."""

    def type_it(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        command, *arguments = map(str, words)
        try:
            code = cli.dispatch(command, arguments)
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        found = capsys.readouterr()
        return code, found.out, found.err

    return type_it


REMEDIES = {
    "rounds=0": "rounds=0: must be at least 1",
    "rounds": "rounds: options are typed key=value",
    "runtime=ray": "runtime=ray: the clients of a server are its sites; leave it out",
    "runtime.workers=3": "runtime.workers=3: the clients of a server are its sites; leave it out",
    "resume=nowhere": "nowhere",
}


@pytest.mark.parametrize("word", REMEDIES)
@pytest.mark.parametrize("command", ["server", "submit"])
def test_wrong_options_are_refused_before_anything_is_started(folder, typed, command, word):
    before = sorted(folder.rglob("*"))
    code, out, err = typed(command, folder, word)
    assert (code, out) == (2, "") and REMEDIES[word] in err
    assert sorted(folder.rglob("*")) == before, "no lock, no queue, no folder of a run"


FLAGS = {
    "--status-port=70000": "--status-port=70000: must be from 0 (none) to 65535",
    "--insecure --host=0.0.0.0": "--insecure --host=0.0.0.0: without TLS a server listens on this",
    "--secure": "unrecognized arguments: --secure",
}


@pytest.mark.parametrize("words", FLAGS)
def test_wrong_flags_are_refused(folder, typed, words):
    code, _, err = typed("server", folder, *words.split(), "rounds=3")
    assert code == 2 and FLAGS[words] in err and not (folder / "queue").exists()


def test_without_tls_the_advice_leads_to_a_loopback_address(folder, typed):
    _, _, err = typed("server", folder, "--insecure", "--host=192.0.2.7", "--print")
    advises(err, "leave out --insecure, or take --host=127.0.0.1")
    assert typed("server", folder, "--insecure", "--host=127.0.0.1", "--print")[0] == 0
    assert typed("server", folder, "--host=192.0.2.7", "--print")[0] == 0
    assert server_folder.checked_host(None, insecure=True) == "127.0.0.1"


@pytest.mark.parametrize("command", ["server", "submit", "cancel", "status"])
def test_a_folder_that_is_no_servers_is_refused(tmp_path, typed, command):
    code, out, err = typed(command, tmp_path / "none")
    assert (code, out) == (1, "") and "fedgpt keys init" in err


def test_a_run_dir_of_another_run_is_refused(folder, tmp_path, typed):
    options = tiny_run(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(load(options)))
    code, _, err = typed("server", folder, *options, "seed=5", "--status-port=0")
    assert code == 2 and "contains another run, which differs in seed" in err
    assert f"continue that run with: fedgpt server {folder} resume={tmp_path / 'run'}" in err


def test_print_shows_what_would_be_started_and_starts_nothing(folder, typed):
    before = sorted(folder.rglob("*"))
    code, out, _ = typed("server", folder, "rounds=3", "--insecure", "--print")
    assert code == 0 and sorted(folder.rglob("*")) == before
    assert f"-m fedgpt.flower.deploy.link {folder} --host=127.0.0.1 --insecure" in out
    assert "http://127.0.0.1:9444/health" in out and f"3 versions in {folder}/runs/" in out


def test_submit_prints_the_options_of_a_run_and_queues_nothing(folder, typed):
    before = sorted(folder.rglob("*"))
    code, out, _ = typed("submit", folder, "rounds=3", "--print")
    assert code == 0 and from_yaml(out).rounds == 3 and sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["server", "submit"])
def test_text_of_the_server_that_is_missing_is_told_at_once(folder, typed, tmp_path, command):
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "one.txt").write_text("The public text.\n")
    words = ["corpus=site", f"corpus.public_path={tmp_path}/public", "pace.begin=1"]
    words.append(f"corpus.held_out_path={tmp_path}/nowhere")
    code, out, err = typed(command, folder, *words)
    assert (code, out) == (2, "") and f"corpus.held_out_path={tmp_path}/nowhere: " in err
    assert not (folder / "queue").exists()


def test_a_run_that_no_site_would_take_is_told(folder, typed, tmp_path):
    said = "fedgpt: corpus=sotu: clients started with fedgpt client take part only with corpus=site"
    assert said in typed("server", folder, "rounds=3", "--print")[2]
    own = [f"corpus.{part}_path={tmp_path}" for part in ("public", "held_out")]
    (tmp_path / "one.txt").write_text("Some text.\n")
    found = typed("server", folder, "corpus=site", *own, "pace.begin=1", "--print")
    assert found[0] == 0 and "take part only with corpus=site" not in found[2]


def test_a_run_may_be_queued_without_a_server_which_is_said(folder, typed):
    for number in (1, 2):
        code, out, err = typed("submit", folder, *SMALL)
        assert (code, out) == (0, f"run {number}\n")
        assert f"no server runs in {folder}; the run waits until one does" in err
    runs = queue.runs(folder)
    assert [run.dated for run in runs] == [True, True]
    assert Path(runs[0].run_dir).parent == folder / "runs" and not (folder / "runs").exists()


def test_status_as_text_and_as_json(folder, typed):
    typed("submit", folder, "rounds=7", "name=later")
    code, out, _ = typed("status", folder)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        *("server", "link", "online", "offline", "queue"),
    ]
    assert "not running" in out and "north, south" in out and "1 (later)" in out
    code, out, _ = typed("status", folder, "--json")
    about = json.loads(out)
    assert code == 0 and not about["serves"] and about["queue"][0]["name"] == "later"
    assert about["queue"][0]["versions"] == 7 and about["ended"] == []


def test_a_run_of_the_queue_is_cancelled_without_a_server(folder, typed):
    """The next server does not begin it."""
    for name in ("first", "second"):
        typed("submit", folder, *SMALL, f"name={name}")
    assert typed("cancel", folder, 2) == (0, "second (run 2) will not begin\n", "")
    first, second = (line for line in typed("status", folder)[1].splitlines() if "queue" in line)
    assert "(is cancelled)" in second and "cancelled" not in first
    assert json.loads(typed("status", folder, "--json")[1])["cancelled"] == [2]
    with serving(folder, LinkProcess(folder)) as supervisor:
        supervisor.end_cancelled()
    first, second = queue.runs(folder)
    assert first.waits and (second.exit_code, second.reason) == (130, "cancelled before it began")
    assert json.loads(typed("status", folder, "--json")[1])["cancelled"] == []
    code, _, err = typed("cancel", folder, 2)
    assert code == 1 and "RUN=2: it has ended already" in err
    assert sorted(one.name for one in (folder / "queue").iterdir()) == ["1.json", "2.json"]


def test_what_is_said_of_a_run_under_way_holds_for_one_that_hands_over_its_model(folder, typed):
    typed("submit", folder, *SMALL, "name=first")
    (run,) = queue.runs(folder)
    run.started = run.submitted
    queue.write(folder, run)
    with serving(folder, LinkProcess(folder)):
        code, out, err = typed("cancel", folder)
        assert (code, err) == (0, "")
        assert out.startswith(
            "first (run 1) stops, with a checkpoint if it has begun, unless it is"
        )


def test_what_cannot_be_cancelled_is_refused(folder, typed):
    code, _, err = typed("cancel", folder)
    assert code == 2 and f"no run is under way in {folder}, and none waits" in err
    typed("submit", folder, *SMALL)
    code, _, err = typed("cancel", folder)
    assert code == 2 and f"no run is under way in {folder}" in err
    advises(err, "name one of the queue: 1")
    assert typed("cancel", folder, 1)[0] == 0
    code, _, err = typed("cancel", folder, 7)
    assert code == 2 and f"RUN=7: {folder} has no such run; there are 1" in err
    code, _, err = typed("cancel", folder, "first")
    assert code == 2 and "argument RUN: invalid int value: 'first'" in err


def test_health_and_metrics_are_served_on_loopback(folder):
    port = free_port()
    with monitored(folder, port):
        with pytest.raises(urllib.error.HTTPError) as down:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        with down.value as answer:
            assert answer.code == 503 and b"the link does not answer" in answer.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["content-type"] == CONTENT_TYPE
            metrics = parsed(answer.read().decode())
        assert metrics["fedgpt_link_up"] == {(): 0}
        assert metrics["fedgpt_clients_approved"] == {(): 2}
        with pytest.raises(urllib.error.HTTPError) as unknown:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/other")
        with unknown.value as answer:
            assert answer.code == 404
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_status_port_in_use_is_told_and_another_or_none_works(folder, typed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = typed("server", folder, f"--status-port={port}")
        assert code == 1
        advises(err.strip(), "name another port, or 0 for none")
        with monitored(folder, 0), monitored(folder, free_port()):
            pass
    assert not (folder / "link.lock").exists()
