"""The deployment of simulations/deploy on this machine, as its page shows it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedgpt.storage.run_folder import read_lines

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"
sys.path.insert(0, str(SIMULATION))
from deployment import SERVER, SITES, Deployment, deployment, wait_until  # noqa: E402

pytestmark = pytest.mark.long
# Python runs a module of this name in every process that finds it on its path
TRACE = """
import os, sys
log = open(os.path.join(os.environ["OPENED"], f"{os.getpid()}.txt"), "a")
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        log.write(arguments[0] + "\\n")
        log.flush()
sys.addaudithook(hook)
"""
SMALL = [
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=2", "local.batch_size=2", "evaluate.tokens=1024", "evaluate.samples=0"),
    "tokenizer.vocab_size=300",
]


@pytest.fixture
def three_sites(short_folder) -> Iterator[Deployment]:
    with deployment(short_folder / "deployment", say=False) as one:
        one.write_texts()
        one.make_keys()
        for site in SITES:
            one.start_client(site)
        yield one


def test_the_script_ends_with_a_model_at_every_site(short_folder):
    command = [sys.executable, str(SIMULATION / "one_host.py"), "--rounds", "4"]
    command += ["--folder", str(short_folder / "here")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, umask=0o022
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the model is at 3 clients" in done.stdout
    for site in SITES:
        assert f"{site}: " in done.stdout
        (model,) = (short_folder / "here" / "state" / site / "models").iterdir()
        assert (model / "config.json").is_file()
    # a client's prepared text can be read back, and DIR may be copied: nobody else may read a file
    for part in ("server", "state", "cache"):
        files = [
            path for path in (short_folder / "here" / part).rglob("*") if not path.is_symlink()
        ]
        assert len(files) > 9
        assert not [path for path in files if path.stat().st_mode & 0o077], part


def test_a_server_that_is_stopped_while_its_run_waits_for_sites_says_so_alone(short_folder):
    with deployment(short_folder / "deployment", say=False) as one:
        one.write_texts()
        one.make_keys()
        server = one.start_server(*one.run_options(*SMALL))
        wait_until(lambda: "waiting for 3 clients: none connected" in one.log("server"), 300, "it")
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=120) == 130
        assert "fedgpt: interrupted before the run began" in one.log("server")
        for wrong in ("Traceback", "killed", "is continued"):
            assert wrong not in one.log("server")


def test_no_process_of_the_server_opens_a_clients_text(three_sites, tmp_path, monkeypatch):
    opened = tmp_path / "opened"
    opened.mkdir()
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(TRACE)
    paths = [str(tmp_path / "hook"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    monkeypatch.setenv("OPENED", str(opened))
    one = three_sites
    server = one.start_server(*one.run_options(*SMALL, "rounds=2", "pace.clients=0"))
    assert server.wait(timeout=300) == 0, one.log("server")
    paths = {line for log in opened.iterdir() for line in log.read_text().splitlines()}
    assert len(list(opened.iterdir())) >= 4, "the server, its link, Flower's starter, the ServerApp"
    below = {part: str(one.text(part)) for part in (*SITES, *SERVER)}
    for part in SERVER:
        assert any(path.startswith(below[part]) for path in paths)
    for site in SITES:
        assert not [path for path in paths if path.startswith(below[site])]
        assert not [path for path in paths if f"/state/{site}" in path or f"/cache/{site}" in path]


def test_a_server_that_is_killed_goes_on_with_the_sites_that_stay(three_sites):
    """The operator starts it again; the queue knows the run. No update is lost or counted twice."""
    one = three_sites
    server = one.start_server()
    options = [*SMALL, "pace=buffer", "pace.clients=3", "rounds=60", "name=kept"]
    one.command("submit", "server", *one.run_options(*options))

    def accepted() -> list[tuple[str, int]]:
        runs = one.server / "runs"
        if not runs.exists() or not (one.run_folder() / "events.jsonl").exists():
            return []
        lines = read_lines(one.run_folder() / "events.jsonl")
        return [(line["client"], line["number"]) for line in lines if line["event"] == "accept"]

    wait_until(lambda: len(accepted()) > 9, 180, "ten updates")
    one.stop("west")
    server.send_signal(signal.SIGKILL)
    server.wait()
    before = accepted()
    one.start_server()  # at once: what the killed one had started is still ending
    one.start_client("west")

    def ended() -> list[dict[str, Any]]:
        return json.loads(one.command("status", "server", "--json"))["ended"]

    wait_until(ended, 300, "the end of the run")
    assert accepted()[: len(before)] == before and len(set(accepted())) == len(accepted()) >= 60
    assert ended()[0]["exit_code"] == 0 and ended()[0]["starts"] == 2
