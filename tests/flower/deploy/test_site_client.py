"""`fedgpt client` and `fedgpt doctor` as commands, at a real server over TLS."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from support.advice import advises
from support.link import free_port
from support.site_server import SiteServer

from fedgpt import cli
from fedgpt.client.site import Site
from fedgpt.core.options import CorpusOptions
from fedgpt.flower.deploy import keys
from fedgpt.flower.site_config import site_of

LONG = 120.0  # seconds; only a bound, the machine may be busy


@pytest.fixture
def server(tmp_path) -> SiteServer:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("The river rose again.\n" * 20)
    return SiteServer(tmp_path)


def words(server: SiteServer, *more: str) -> list[str]:
    """The arguments of a client whose folders are beside the kit."""
    root = server.kit.parent
    own = ["--text", "text", "--state", "state", "--cache", "cache"]
    own[1::2] = [str(root / name) for name in own[1::2]]
    return [str(server.kit), *own, *more]


class Process:
    """A client in a process of its own; `lines` grows as it logs."""

    def __init__(self, arguments: list[str]):
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedgpt", "client", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + LONG
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline and self.process.poll() is None, self.lines
            time.sleep(0.1)

    def end(self) -> int:
        code = self.process.wait(LONG)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture
def start() -> Iterator:
    made: list[Process] = []

    def one(arguments: list[str]) -> Process:
        made.append(Process(arguments))
        return made[-1]

    yield one
    for process in made:
        if process.process.poll() is None:
            process.process.kill()
        process.end()


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_client_connects_and_stops_at_a_signal(server, start, number, code):
    with server.listening():
        client = start(words(server, "--threads", "1"))
        client.wait_for("connected; waiting for jobs")
        client.process.send_signal(number)
        assert client.end() == code
    log = "".join(client.lines)
    assert f"connecting to 127.0.0.1, port {server.port}, as clinic; the fingerprint of its" in log
    assert server.server.ca_fingerprint in log and "Traceback" not in log


@pytest.mark.slow
def test_a_client_waits_for_a_server_that_is_not_there_yet(server, start):
    client = start(words(server))
    client.wait_for("the server does not respond")
    with server.listening():
        client.wait_for("connected; waiting for jobs")
        client.process.terminate()
        assert client.end() == 0


@pytest.mark.slow
def test_a_client_whose_key_was_revoked_ends_with_one_message(server, start):
    with server.listening():
        keys.revoke(server.folder, "clinic")
        client = start(words(server))
        assert client.end() == 1
    assert client.lines[-1].startswith("fedgpt: ") and "Traceback" not in "".join(client.lines)


@pytest.fixture
def run(capsys):
    """A command in this process: its exit code and what it printed, or else its error."""

    def one(command: str, arguments: list[str]) -> tuple[int, str]:
        code = cli.dispatch(command, arguments)
        printed = capsys.readouterr()
        return code, printed.out or printed.err

    return one


def test_a_check_that_waiting_does_not_mend_ends_the_client(server, run):
    server.certify(days=-400)
    with server.listening():
        code, printed = run("client", words(server))
    assert code == 1 and "fedgpt: TLS: the server's certificate ended on" in printed


def test_text_that_is_not_there_is_wrong_usage(server, run):
    with server.listening():
        code, printed = run("client", [*words(server), "--text", "nowhere"])
    assert code == 2 and "  - --text nowhere: " in printed


def test_the_doctor_prints_a_line_for_each_check_and_tells_a_failed_one_by_its_code(server, run):
    with server.listening():
        code, printed = run("doctor", words(server))
        assert code == 0 and printed.count(" ok ") == len(printed.splitlines()) == 11
        assert run("doctor", [str(server.kit)])[0] == 0
    code, printed = run("doctor", words(server))
    assert code == 1 and "port     WRONG    127.0.0.1" in printed


def test_print_says_what_would_be_started_and_starts_nothing(server, run):
    code, printed = run("client", words(server, "--print", "--device", "cpu", "--threads", "3"))
    assert code == 0 and "device  cpu, threads 3" in printed
    assert f"server  127.0.0.1:{server.port}, CA {server.server.ca_fingerprint}" in printed
    assert not (server.kit.parent / "state").exists()


def test_what_is_typed_wins_over_the_policy(server, run):
    policy = server.kit.parent / "policy.yaml"
    policy.write_text("text: {path: elsewhere}\ndevice: cuda\nthreads: 7\n")
    file = ["--policy", str(policy)]
    printed = run("client", words(server, "--print", "--threads", "3", *file))[1]
    assert "device  cuda, threads 3" in printed and f"text    {server.kit.parent}/text" in printed
    assert "text    elsewhere" in run("client", [str(server.kit), "--print", *file])[1]


def test_wrong_usage_is_told_with_exit_code_2(server, run):
    code, printed = run("client", [str(server.kit), "--print"])
    assert code == 2
    advises(printed, "add --text FOLDER, the site's text")
    assert run("client", [str(server.kit), "--print", "--text", "text"])[0] == 0
    assert run("client", words(server, "--threads", "0")) == (
        *(2, "fedgpt: 1 problem in the configuration:\n  - --threads 0: must be from 1 to 4096\n"),
    )
    code, printed = run("client", words(server, "--policy", "none.yaml"))
    assert code == 2 and "none.yaml: cannot be read" in printed


NAMES = [
    ("plain", {}),
    ("with space", {"text_field": "the body", "label_field": "kind"}),
    ('a "quoted" one', {"text_field": 'messages[0]["x"]', "document_bytes": 100}),
    ("it's $HOME", {"bad_records": "skip", "label_field": "it's = a \\ path"}),
    ("k=v ünïcode \U0001f600", {"text_field": "a\tb\x7f"}),
]


@pytest.mark.parametrize("folder, fields", NAMES, ids=[str(n) for n in range(len(NAMES))])
def test_the_command_for_a_stock_supernode_gives_it_exactly_this_site(
    tmp_path, server, run, folder, fields
):
    """As a shell and Flower's own parser read the command."""
    home = tmp_path / folder
    (home / "notes").mkdir(parents=True)
    policy = tmp_path / "policy.yaml"
    written = json.dumps({"text": fields, "device": "cpu"}, ensure_ascii=False)
    policy.write_text(written.replace("\x7f", "\\u007f"))  # YAML has it as an escape only
    own = ["--text", str(home / "notes"), "--state", str(home / "state"), "--cache", str(home)]
    code, printed = run("client", [str(server.kit), *own, "--policy", str(policy), "--stock"])
    assert code == 0
    arguments = shlex.split(printed.splitlines()[-1])
    (config,) = [arguments[n + 1] for n, word in enumerate(arguments) if word == "--node-config"]
    corpus = CorpusOptions(name="files", client="file", path=str(home / "notes"), **fields)
    wanted = Site("clinic", corpus, str(home / "state"), str(home), "cpu")
    assert site_of(parse_config_args([config])) == wanted


STOCK_REFUSES = {
    "hours": "20:00-06:00",
    "most_steps": 9,
    "runs": ["night"],
    "threads": 2,
    "privacy": {"units": ["example"]},
}


@pytest.mark.parametrize("key", STOCK_REFUSES)
def test_what_a_stock_supernode_cannot_do_is_refused_by_name(server, run, key):
    policy = server.kit.parent / "policy.yaml"
    policy.write_text(json.dumps({key: STOCK_REFUSES[key]}))
    typed = words(server, "--policy", str(policy))
    code, printed = run("client", [*typed, "--stock"])
    assert code == 2 and f"  - {'privacy.units' if key == 'privacy' else key}=" in printed
    assert not (server.kit.parent / "state").exists()
    advises(printed, "leave it out, or leave out --stock")
    assert run("client", [*typed, "--print"])[0] == 0
    policy.write_text("")
    assert run("client", [*typed, "--stock"])[0] == 0
    if key == "threads":
        assert run("client", words(server, "--threads", "2", "--stock"))[0] == 2


@pytest.mark.slow
def test_the_command_for_a_stock_supernode_connects_one(server, run):
    """Its key and its CA are files for this user, and it is told what such a node is."""
    code, printed = run("client", words(server, "--stock"))
    *about, command = printed.splitlines()
    assert code == 0 and "runs whatever app the server sends" in about[0]
    assert all(line.startswith("# ") for line in about)
    key = server.kit.parent / "state" / "stock" / "clinic.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    program = Path(sys.executable).parent / "flower-supernode"
    with (
        server.listening() as nodes,
        subprocess.Popen(
            [str(program), *shlex.split(command)[1:], "--port", str(free_port())],
            env={**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as process,
    ):
        deadline = time.monotonic() + LONG
        while not nodes():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        process.terminate()
        process.wait(LONG)
