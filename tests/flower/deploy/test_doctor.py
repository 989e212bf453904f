"""What keeps a site from its server, each cause for real: certificates, ports, proxies, clocks."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.advice import advises
from support.site_server import REFUSAL, SiteServer, proxy, raw_server

from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.core.options import CorpusOptions
from fedgpt.flower.deploy import doctor, keys, probe
from fedgpt.flower.deploy.doctor import Doctor, Finding, KitConnection
from fedgpt.flower.deploy.kit import read_kit


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch) -> None:
    for name in list(os.environ):
        if name.lower() in ("https_proxy", "http_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server(tmp_path) -> SiteServer:
    return SiteServer(tmp_path)


def site(root: Path, text: str | None = None) -> Site:
    folder = root / "text"
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text("The river rose again.\n" * 20)
    options = CorpusOptions(name="files", client="file", path=text or str(folder))
    return Site("clinic", options, str(root / "state"), str(root / "cache"))


def found(server: SiteServer, **about) -> list[Finding]:
    return list(Doctor(server.kit, **about).findings())


def wrong(server: SiteServer, about: str, **more) -> Finding:
    """The last finding of a server, which must be this one, and the only one with a problem."""
    *before, last = found(server, **more)
    assert [one.problem for one in before] == [""] * len(before)
    assert last.about == about and last.problem
    assert str(last).startswith(about) and last.problem in str(last)
    return last


def test_where_all_is_well_each_check_says_what_it_has_found(server, tmp_path):
    with server.listening():
        lines = found(server, site=site(tmp_path))
    assert [one.problem for one in lines] == [""] * len(lines)
    told = {one.about: one.found for one in lines}
    assert list(told) == [
        *("kit", "name", "port", "TLS", "link", "clock", "end", "key", "text", "state", "cache"),
    ]
    assert told["kit"] == f"clinic, approved by the server 127.0.0.1:{server.port}"
    assert told["TLS"].endswith(f"of the CA {server.server.ca_fingerprint}")
    assert told["key"] == "the server accepts it"
    assert told["text"] == f"1 document, 440 bytes: {tmp_path / 'text'}"
    assert all(str(one).split()[1] == "ok" for one in lines)


def test_a_kit_that_others_can_read_is_refused_before_anything_else(server):
    server.kit.chmod(0o644)
    assert "has mode 0644" in wrong(server, "kit").problem
    server.kit.chmod(0o600)
    assert found(server)[0].problem == ""


def test_a_kit_without_its_approval_is_told(server, tmp_path):
    approval = tmp_path / "clinic.approval"
    approval.rename(tmp_path / "elsewhere")
    assert "clinic.kit is not approved" in wrong(server, "kit").problem
    (tmp_path / "elsewhere").rename(approval)
    assert found(server)[0].problem == ""


def test_a_server_that_the_policy_does_not_name_is_told_before_it_is_asked(server):
    policy = Policy(servers=[f"SHA256:{'a' * 43}"])
    assert (
        "the site's policy has servers=[SHA256:aaa" in wrong(server, "kit", policy=policy).problem
    )


def test_a_name_that_is_not_known_is_told(tmp_path):
    one = wrong(SiteServer(tmp_path, ("no-such-host.invalid",)), "name")
    assert one.problem.startswith("no-such-host.invalid is not known here") and one.passing
    advises(one.problem, "ask the operator whether the name is right, and the administrator of ")


def test_the_first_host_that_can_be_reached_is_taken(tmp_path):
    server = SiteServer(tmp_path, ("no-such-host.invalid", "127.0.0.1"))
    with server.listening():
        one = Doctor(server.kit)
        assert not any(finding.problem for finding in one.findings())
    assert one.host == "127.0.0.1"


def test_a_closed_port_is_told(server):
    one = wrong(server, "port")
    assert one.problem == f"127.0.0.1, port {server.port} cannot be reached (Connection refused)"
    assert one.passing


def test_a_port_that_drops_what_comes_is_told(server, monkeypatch):
    """As a firewall does: the queue of a listening socket is full."""
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", server.port), backlog=0):
        queued = [socket.socket() for _ in range(4)]
        for one in queued:
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", server.port))
        finding = wrong(server, "port")
        for one in queued:
            one.close()
    assert "a firewall may drop it" in finding.problem and finding.passing
    advises(finding.problem, f"ask for outgoing TCP to port {server.port}")


def test_a_port_that_accepts_and_is_silent_is_told(server, monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0.5)
    with raw_server(server.port, lambda one: one.recv(1) and one.recv(1 << 16) and one.recv(1)):
        finding = wrong(server, "TLS")
    assert "accepts connections, but does not answer" in finding.problem and finding.passing


def test_a_server_without_tls_is_told(server):
    with server.web(200, "<html>", tls=False):
        finding = wrong(server, "TLS")
    assert f"port {server.port}: a server without TLS answers there" in finding.problem
    advises(finding.problem, "ask the operator for the port of fedgpt's server, or whether it runs")


def test_a_connection_that_ends_without_a_word_is_tried_again(server):
    """A proxy whose server is down ends it so."""
    with raw_server(server.port, lambda one: one.recv(9999)):
        finding = wrong(server, "TLS")
    assert f"port {server.port}: no TLS server answers there" in finding.problem
    assert finding.passing


def test_a_server_that_speaks_something_else_is_told(server):
    with raw_server(server.port, lambda one: one.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")):
        finding = wrong(server, "TLS")
    assert f"port {server.port}: no TLS server answers there" in finding.problem


def test_a_server_of_another_ca_is_told(server, tmp_path):
    other = SiteServer(tmp_path / "other")
    for name in ("server.pem", "server.key"):
        (server.folder / name).write_bytes((other.folder / name).read_bytes())
    with server.web(401, REFUSAL):
        finding = wrong(server, "TLS")
    assert f"not of the CA in the kit ({server.server.ca_fingerprint};" in finding.problem
    assert not finding.passing
    advises(finding.problem, "ask the operator which CA the server has")


def test_a_certificate_for_another_name_is_told_with_the_names_that_it_has(tmp_path):
    server = SiteServer(tmp_path, ("127.0.0.2",))
    server.certify(("fed.example.org",))
    with server.listening("127.0.0.2"):
        finding = wrong(server, "TLS")
    assert "is for fed.example.org, localhost, 127.0.0.1, and not for 127.0.0.2" in finding.problem
    advises(finding.problem, "ask the operator to add 127.0.0.2 to server.json and to renew")


def test_an_answer_of_a_server_without_an_end_is_told_and_not_read(server):
    """A chunk of the length -1 is read to its end by http.client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*server.files)

    def serve(one: socket.socket) -> None:
        with context.wrap_socket(one, server_side=True) as tls:
            tls.recv(1 << 16)
            tls.sendall(b"HTTP/1.1 401 No\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n")
            while True:
                tls.sendall(b"x" * 9999)

    with raw_server(server.port, serve):
        finding = wrong(server, "TLS")
    advises(finding.problem, "the server's answer has no end; ask the operator for the port")


@pytest.mark.parametrize("date", ["Mon, 01 Jan 2024 00:00:00 -0000", "soon", "", None])
def test_a_date_that_is_none_is_not_compared(date):
    assert probe.time_of(date) is None


CLOCK_REMEDIES = {
    -400: "ask the operator for: fedgpt keys renew",
    10: "set the clock of this machine",
}


@pytest.mark.parametrize(
    "days, told",
    [(-400, "ended on "), (10, "is valid from ")],
)
def test_a_certificate_of_another_time_is_told(server, days, told):
    server.certify(days=days)
    with server.listening():
        finding = wrong(server, "TLS")
    assert finding.problem.startswith(f"the server's certificate {told}")
    assert finding.problem.endswith(CLOCK_REMEDIES[days])
    server.certify()
    with server.listening():
        assert not any(one.problem for one in found(server))


def test_a_certificate_that_ends_soon_is_a_warning(server):
    server.certify(days=-380)
    with server.listening():
        problems = [one for one in found(server) if one.problem]
    (one,) = problems
    assert one.about == "end" and one.warning and "ends in 1" in one.problem
    assert str(one).split()[1] == "warning"
    advises(one.problem, "ask the operator for: fedgpt keys renew")


def test_a_web_server_with_the_right_certificate_is_told(server):
    with server.web(404, "<html>not found</html>"):
        finding = wrong(server, "link")
    assert "answers with status 404, and not as fedgpt's" in finding.problem
    advises(finding.problem, "ask the operator for the port")


@pytest.mark.parametrize(
    "ahead, told",
    [
        (3600, "3600 s behind the server's"),
        (-60, "60 s ahead of the server's"),
        (200, ""),
        (-3, ""),
    ],
)
def test_a_clock_that_is_wrong_is_told(server, ahead, told):
    """A signature may be five minutes old, and five seconds from the future."""
    with server.web(401, REFUSAL, ahead=ahead):
        lines = {one.about: one for one in Doctor(server.kit).findings(key=False)}
    if told:
        seconds = int(lines["clock"].problem.split()[4])
        assert abs(seconds - abs(ahead)) <= 5 and told.split(" s ")[1] in lines["clock"].problem
        advises(lines["clock"].problem, "set it (by NTP), as signatures have a time")
    else:
        assert lines["clock"].problem == ""


def test_a_key_that_was_revoked_is_told(server):
    with server.listening():
        keys.revoke(server.folder, "clinic")
        finding = wrong(server, "key")
    assert "not approved there, or it was revoked" in finding.problem and not finding.passing
    advises(finding.problem, "ask the operator, and make a new request if it was revoked")


def test_a_client_that_is_connected_already_is_told(server):
    with server.listening():
        first = KitConnection(read_kit(server.kit), "127.0.0.1")
        first.activate()
        finding = wrong(server, "key")
        assert "a client with this kit is connected already" in finding.problem
        advises(finding.problem, "stop the other one, or try again in a minute")
        first.deactivate()
        first.close()
        assert not any(one.problem for one in found(server))


@pytest.fixture
def through(monkeypatch) -> Iterator[int]:
    """The port of a proxy that the environment names."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    yield port


def test_a_proxy_of_the_environment_is_used_by_all_checks_and_told(server, through):
    seen: list[str] = []
    with server.listening(), raw_server(through, proxy(b"HTTP/1.1 200 OK\r\n\r\n", seen)):
        lines = found(server)
    assert not any(one.problem for one in lines)
    (told,) = [one.found for one in lines if one.about == "proxy"]
    assert told == f"connects through http://127.0.0.1:{through} (HTTPS_PROXY)"
    assert len(seen) >= 3 and set(seen) == {f"CONNECT 127.0.0.1:{server.port} HTTP/1.1"}


def test_a_proxy_that_refuses_is_told(server, through, monkeypatch):
    with server.listening():
        with raw_server(through, proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n", [])):
            finding = wrong(server, "port")
        assert "does not connect to 127.0.0.1" in finding.problem
        assert "(HTTP/1.1 403 Forbidden)" in finding.problem
        advises(finding.problem, "allow it there, or put 127.0.0.1 into NO_PROXY")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert not any(one.problem for one in found(server))


def test_a_proxy_that_the_client_cannot_use_is_told(server, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")
    for excepted in ("", "127.0.0.1"):
        monkeypatch.setenv("NO_PROXY", excepted)
        with server.listening():
            problem = wrong(server, "port").problem
    advises(
        problem,
        "start the client without that variable, such as with: env -u HTTPS_PROXY fedgpt ...",
    )
    monkeypatch.delenv("HTTPS_PROXY")
    with server.listening():
        assert not any(one.problem for one in found(server))


def of_site(server: SiteServer, about: str, one: Site) -> str:
    (finding,) = [f for f in found(server, site=one) if f.about == about]
    return finding.problem


def test_text_that_cannot_be_read_is_told_as_it_is_typed(server, tmp_path):
    assert of_site(server, "text", site(tmp_path, str(tmp_path / "none"))).startswith(
        f"--text {tmp_path / 'none'}: "
    )
    assert of_site(server, "text", site(tmp_path)) == ""


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_told(server, tmp_path, monkeypatch):
    one = site(tmp_path)
    (tmp_path / "state").write_text("a file")
    problem = of_site(server, "state", one)
    advises(problem, "choose another folder, or change its owner")
    (tmp_path / "state").unlink()
    assert of_site(server, "state", one) == ""
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 60)
    advises(of_site(server, "cache", one), "make room there, or choose a folder on another disk")
