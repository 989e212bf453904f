"""The link as a process: stock nodes, attackers, kill -9, and other users of the machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.fab import Fab
from support.link import PROTOBUF, Site, free_port, server_folder, write_sites
from support.users import NOBODY
from support.world import wait_until

from fedgpt.flower.deploy import link
from fedgpt.flower.deploy.control import Control
from fedgpt.flower.processes import _descendants, child

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning"),  # of flwr.cli
]

PROJECT = """[project]
name = "fedgpt-test"
version = "0.1.0"
description = "A test"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedgpt"

[tool.flwr.app.components]
serverapp = "link_app:server"
clientapp = "link_app:client"

[tool.flwr.app.config]
out = ""
rounds = 1
nodes = 1
"""
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
LONG = 120.0  # seconds; only a bound, the machine may be busy


@dataclass
class Server:
    """A server's folder and the link that runs in it."""

    folder: Path
    port: int
    sites: list[Site]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "fedgpt.flower.deploy.link", str(self.folder)]
        log = (self.folder / "link.log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1"],
            env={**os.environ, **ENVIRONMENT, "FLWR_HOME": str(self.folder / "flower")},
            stdout=log,
            stderr=log,
        )
        log.close()
        wait_until(self.ready, LONG)

    def ready(self) -> bool:
        assert self.process and self.process.poll() is None, self.log()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def stop(self, sign: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(sign)
        code = self.process.wait(60)
        self.process = None
        return code

    def log(self) -> str:
        return (self.folder / "link.log").read_text()

    def reasons(self) -> list[str]:
        lines = (self.folder / "audit.jsonl").read_text().splitlines()
        return [json.loads(line)["reason"] for line in lines]

    def resident(self) -> int:
        """Memory of the link, MiB."""
        assert self.process
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) >> 10

    def nodes(self) -> dict[bytes, tuple[int, str]]:
        """Public key -> node id and status."""
        with Control(self.folder) as client:
            found = client.api.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: (node.node_id, node.status) for node in found}

    def submit(self, out: Path, rounds: int) -> int:
        """Start a run of `rounds` jobs for one node; its id."""
        code = Path(__file__).parents[2] / "support" / "link_app.py"
        fab = Fab(
            "",
            build_fab_from_files({"pyproject.toml": PROJECT.encode(), "link_app.py": code})[0],
            {},
        )
        config = user_config_to_proto({"out": str(out), "rounds": rounds, "nodes": 1})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=config, federation=NOOP_FEDERATION_ID
        )
        with Control(self.folder) as client:
            return client.api.StartRun(request).run_id

    def status(self, run: int) -> tuple[str, str]:
        with Control(self.folder) as client:
            found = client.api.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        return found.status, found.sub_status

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        return httpx.Client(verify=context, base_url=f"https://127.0.0.1:{self.port}", timeout=30)

    def pull(self, client: httpx.Client, site: Site) -> int:
        """The status of an honest poll; one that asks for no node is answered 401 by Flower."""
        node = self.nodes().get(site.public, (0, ""))[0]
        request = PullMessagesRequest()
        request.node.node_id = node
        headers = {"content-type": PROTOBUF.decode(), **site.headers()}
        answer = client.post(
            "/v1/fleet/pull-messages", content=request.SerializeToString(), headers=headers
        )
        return answer.status_code


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    sites = [Site("north"), Site("south")]
    folder = tmp_path / "server"
    server = Server(folder, server_folder(folder, sites), sites)
    server.start()
    yield server
    if server.process is not None:
        server.stop(signal.SIGKILL)


def supernode(server: Server, site: Site | None, *arguments: str):
    """A stock node; `arguments` in place of the server's CA."""
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{server.port}"]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--max-retries", "30"]
    if site is not None:
        key = site.write(server.folder.parent / f"{site.name}.ssh")
        command += ["--auth-supernode-private-key", str(key)]
    command += arguments or ("--root-certificates", str(server.folder / "ca.pem"))
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(server.folder.parent / "node")}
    return child(command, environment, server.folder.parent / "node.log")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def name(pid: int) -> str:
    """The program of a process, or the script that it runs."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return Path(words[1 if Path(words[0]).name.startswith("python") else 0]).name


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run."""
    return [
        pid
        for pid in pids
        if Path(f"/proc/{pid}").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def test_a_stock_node_works_and_goes_on_after_the_link_was_killed_in_a_run(server, tmp_path):
    north, _ = server.sites
    out = tmp_path / "out.jsonl"
    with supernode(server, north):
        run = server.submit(out, rounds=1000)
        wait_until(lambda: len(lines(out)) > 3, LONG)
        ids = {key: node for key, (node, _) in server.nodes().items()}
        assert {(line["node"], line["right"]) for line in lines(out)[1:]} == {
            (ids[north.public], True)
        }
        assert server.reasons() == []
        children = _descendants(server.process.pid)
        assert lines(out)[0]["pid"] in children and len(children) >= 3
        server.stop(signal.SIGKILL)
        begin = time.monotonic()
        wait_until(lambda: not alive(children), 15)
        print(f"children ended {time.monotonic() - begin:.1f} s after kill -9 of the link")
        out.unlink()
        server.start()
        assert {key: node for key, (node, _) in server.nodes().items()} == ids
        assert server.status(run) == ("finished", "stopped")
        run = server.submit(out, rounds=1)
        wait_until(lambda: server.status(run)[0] == "finished", LONG)
        assert server.status(run)[1] == "completed" and lines(out)[1]["right"]


def test_a_link_that_is_stopped_or_cannot_go_on_leaves_nothing_behind(server, tmp_path):
    """In a run: stopped, and with flower-superexec killed, which starts ServerApps."""
    out = tmp_path / "out.jsonl"
    for way in ("stop", "kill"):
        server.submit(out, rounds=1000)
        wait_until(lambda: len(lines(out)) > 0, LONG)
        children = _descendants(server.process.pid)
        if way == "stop":
            assert server.stop() == 0
        else:
            os.kill(
                next(pid for pid in children if name(pid) == "flower-superexec"), signal.SIGKILL
            )
            assert server.process.wait(60) == 1
            assert "flower-superexec ended" in server.log()
        wait_until(lambda pids=children: not alive(pids), 15)
        left = {path.name for path in server.folder.iterdir()}
        assert not left & {"control.sock", "superexec.secret"}
        if way == "stop":
            out.unlink()
            server.start()


REFUSED = {
    "another key": (Site("x"), (), "unknown_key", "not approved"),
    "no key": (None, (), "path", "only registered nodes may join"),
    "no TLS": (None, ("--insecure",), "plaintext", "this port speaks TLS"),
    "another CA": (Site("north"), ("--root-certificates", "other.pem"), "tls", "certificate"),
}


def test_stock_nodes_that_may_not_join_are_told_why(server, tmp_path):
    other = tmp_path / "other"
    server_folder(other, [])
    for case, (site, arguments, reason, said) in REFUSED.items():
        given = [str(other / "ca.pem") if a == "other.pem" else a for a in arguments]
        begin = time.monotonic()
        with supernode(server, site, *given) as node:
            assert node.wait(60) == 1, case
        print(f"{case}: refused after {time.monotonic() - begin:.1f} s, with the start of the node")
        assert said in (tmp_path / "node.log").read_text(), case
        assert server.reasons()[-1] == reason, case
    assert {status for _, status in server.nodes().values()} == {"registered"}


def test_a_revoked_site_is_refused_and_its_node_ends(server):
    north, south = server.sites
    with supernode(server, north) as node, server.client() as client:
        wait_until(lambda: server.nodes()[north.public][1] == "online", LONG)
        kept = server.nodes()[south.public]
        write_sites(server.folder, [south, Site("west")], revoked=[north])
        begin = time.monotonic()
        wait_until(lambda: server.pull(client, north) == 401, 10)
        print(f"refused {time.monotonic() - begin:.1f} s after the list of sites changed")
        assert node.wait(60) is not None
        assert server.pull(client, south) == 200
    nodes = server.nodes()
    assert nodes[south.public] == kept and len(nodes) == 3
    assert nodes[north.public][1] == "unregistered"
    # a damaged list changes nothing
    (server.folder / "sites.json").write_text("{")
    time.sleep(2.5)
    with server.client() as client:
        assert server.pull(client, south) == 200
    assert "stay as they were" in server.log()


def test_bodies_and_silent_connections_cost_nothing(server):
    north, _ = server.sites
    context = ssl.create_default_context(cafile=str(server.folder / "ca.pem"))

    def secure() -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    with server.client() as client:
        assert server.pull(client, north) == 200
        before = server.resident()
        for megabytes, chunked in ((300, False), (1024, False), (300, True), (1024, True)):
            head = "transfer-encoding: chunked" if chunked else f"content-length: {megabytes << 20}"
            sent, piece = 0, bytes(1 << 20)
            chunk = b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece
            with secure() as one:
                one.sendall(
                    f"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\n{head}\r\n"
                    "content-type: application/protobuf\r\n\r\n".encode()
                )
                try:
                    while sent < megabytes:
                        one.sendall(chunk)
                        sent += 1
                except OSError:
                    pass
            print(
                f"{megabytes} MB, chunked={chunked}: {sent} MB sent,"
                f" {server.resident() - before} MB more memory"
            )
            assert server.resident() - before < 50
        with ExitStack() as stack:
            begin, slowest, silent = time.monotonic(), 0.0, []
            for number in range(200):
                kind = number % 4
                try:
                    one = (
                        secure()
                        if kind >= 2
                        else socket.create_connection(("127.0.0.1", server.port))
                    )
                except OSError:
                    continue
                stack.callback(one.close)
                silent.append(one)
                if kind in (1, 3):
                    one.sendall(b"\x16\x03\x01\x02" if kind == 1 else b"POST /v1/fleet/pull-mes")
            while time.monotonic() - begin < 30 and not all(map(ended, silent)):
                asked = time.monotonic()
                assert server.pull(client, north) == 200
                slowest = max(slowest, time.monotonic() - asked)
                time.sleep(0.2)
            seconds = time.monotonic() - begin
        print(
            f"{len(silent)} silent connections ended in {seconds:.1f} s; slowest poll"
            f" {slowest:.2f} s; {server.resident() - before} MB more memory"
        )
        assert seconds < 30 and len(silent) >= 100 and server.resident() - before < 50


def ended(one: socket.socket) -> bool:
    """Whether the peer has ended a connection."""
    one.settimeout(0.001)
    try:
        while one.recv(4096):
            pass
    except (TimeoutError, ssl.SSLWantReadError):
        return False
    except OSError:
        pass
    return True


def loopback_ports(server: Server) -> set[int]:
    """Ports on which the link listens."""
    inodes = set()
    for open_file in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            inodes.add(str(open_file.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {
        int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and row[9] in inodes
    }


def test_control_and_runtime_are_closed_from_outside_and_to_other_users(server):
    north, _ = server.sites
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString()
    headers = {"content-type": PROTOBUF.decode()}
    ports = loopback_ports(server)
    assert server.port in ports and len(ports) == 2
    (inner,) = ports - {server.port}
    with server.client() as client:
        for path in ("/v1/runtime/acquire-task", "/v1/control/list-runs", "/health", "/docs"):
            answer = client.post(path, content=request, headers={**headers, **north.headers()})
            assert answer.status_code == 403
    base = f"http://127.0.0.1:{inner}"
    answer = httpx.post(f"{base}/v1/runtime/acquire-task", content=request, headers=headers)
    assert answer.status_code in (401, 403) and b"task" not in answer.content
    for path in ("/v1/control/list-runs", "/v1/fleet/pull-messages", "/health", "/docs", "/"):
        assert httpx.post(f"{base}{path}", content=b"", headers=headers).status_code == 403
    for path in ("/v1/runtime/../control/list-runs", "/v1/runtime/%2e%2e/control/list-runs"):
        with socket.create_connection(("127.0.0.1", inner)) as one:
            one.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n".encode())
            assert one.recv(100).split()[1] in (b"403", b"404")
    socket_file = server.folder / "control.sock"
    assert (socket_file.stat().st_mode & 0o777, server.folder.stat().st_mode & 0o777) == (
        0o600,
        0o700,
    )
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket_file))) as client:
        assert client.get("http://link/health").status_code == 200
        assert client.post("http://link/v1/fleet/pull-messages").status_code == 403
        assert client.post("http://link/v1/runtime/acquire-task").status_code == 403
    if os.getuid() == 0:
        code = (
            "import socket, sys\n"
            "with socket.create_connection(('127.0.0.1', int(sys.argv[1]))) as one:\n"
            "    try:\n"
            "        one.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n"
            "        print(len(one.recv(9)))\n"
            "    except ConnectionError:\n"
            "        print(0)\n"
        )
        command = ["/usr/bin/env", "python3", "-c", code, str(inner)]
        for user, said in ((os.getuid(), "9"), (NOBODY, "0")):
            other = subprocess.run(command, user=user, stdout=subprocess.PIPE, check=True)
            assert other.stdout.decode().strip() == said


def test_one_link_runs_in_a_folder_and_a_wrong_folder_is_refused(
    server, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(link, "LOCK_SECONDS", 0.1)

    def run(*arguments: str) -> tuple[int, str]:
        code = link.main(arguments)
        return code, capfd.readouterr().err

    assert "another link runs" in run(str(server.folder))[1]
    code, said = run(str(tmp_path / "none"))
    assert code == 2 and "fedgpt keys init" in said and "Traceback" not in said
    wide = tmp_path / "wide"
    server_folder(wide, [])
    wide.chmod(0o755)
    code, said = run(str(wide))
    assert code == 2 and "chmod 700" in said
    wide.chmod(0o700)
    (wide / "server.json").write_text(json.dumps({"port": server.port}))
    code, said = run(str(wide), "--host", "127.0.0.1")
    assert code == 1 and f"port {server.port}" in said and "Traceback" not in said
    (wide / "server.key").write_text("no key")
    code, said = run(str(wide))
    assert code == 1 and "server.pem and server.key cannot be used" in said
    assert "Traceback" not in said
    (wide / "sites.json").write_text("{}")
    code, said = run(str(wide))
    assert code == 1 and "sites.json is damaged" in said
