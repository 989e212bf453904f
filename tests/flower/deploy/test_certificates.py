"""A Python client with the CA accepts the server's certificate, over real sockets, and no other."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.advice import advises
from support.deployment import HOSTS, deployment

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import write_text
from fedgpt.flower.deploy.certificates import host_of, new_ca, new_certificate, pem, read_ca
from fedgpt.flower.deploy.documents import private_key, private_text
from fedgpt.flower.deploy.folder import ca_of, init, read_server, renew
from fedgpt.flower.deploy.kit import read_kit

NOW = datetime.now(UTC)
# why OpenSSL refuses a certificate
EXPIRED, NOT_YET, OTHER_HOST, OTHER_ADDRESS, OTHER_CA, NO_CA = 10, 9, 62, 64, 20, 79


def connect(certificate: Path, key: Path, ca: Path, host: str) -> Mapping[str, object]:
    """The server's certificate, as a client saw it that asked for `host` and trusts `ca`."""
    serving = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, suppress(OSError):  # the client has refused
                serving.wrap_socket(peer, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=5) as plain,
                client.wrap_socket(plain, server_hostname=host) as secure,
            ):
                return secure.getpeercert() or {}
        finally:
            thread.join()


def refusal(certificate: Path, key: Path, ca: Path, host: str) -> int:
    """Why a client refuses, as a number of OpenSSL."""
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        connect(certificate, key, ca, host)
    return caught.value.verify_code


def files(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "server.pem", folder / "server.key", folder / "ca.pem"


@pytest.fixture
def folder(tmp_path) -> Path:
    return deployment(tmp_path).folder


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1", "FED.example.org"])
def test_a_client_accepts_the_certificate_for_each_host(folder, host):
    assert connect(*files(folder), host)["subject"] == ((("commonName", "fedgpt server"),),)


@pytest.mark.parametrize(
    "host", ["example.org", "a.fed.example.org", "fed.example.com", "10.0.0.6", "127.0.0.2", "::1"]
)
def test_a_client_refuses_another_host(folder, host):
    assert refusal(*files(folder), host) in (OTHER_HOST, OTHER_ADDRESS)


@pytest.mark.parametrize("days, code", [(-397, EXPIRED), (-396, EXPIRED), (2, NOT_YET)])
def test_a_client_refuses_a_certificate_outside_its_time(folder, tmp_path, days, code):
    made = NOW + timedelta(days=days)
    ca_key, ca = new_ca(NOW - timedelta(days=1000))
    key = ec.generate_private_key(ec.SECP256R1())
    late = new_certificate(ca, ca_key, key.public_key(), HOSTS, made)
    for name, text in (("c", pem(late)), ("k", private_text(key)), ("ca", pem(ca))):
        write_text(tmp_path / name, text)
    assert refusal(tmp_path / "c", tmp_path / "k", tmp_path / "ca", HOSTS[0]) == code


def test_a_site_whose_clock_is_some_hours_slow_accepts_a_new_certificate(folder):
    ca, ca_key = ca_of(folder)
    ahead = new_certificate(ca, ca_key, ca_key.public_key(), HOSTS, NOW + timedelta(hours=23))
    assert ahead.not_valid_before_utc < NOW and ca.not_valid_before_utc < NOW


def test_a_client_refuses_the_certificate_of_another_ca(folder, tmp_path):
    other = init(tmp_path / "other", HOSTS).folder
    assert refusal(folder / "server.pem", folder / "server.key", other / "ca.pem", HOSTS[0]) == (
        OTHER_CA
    )


def test_the_servers_key_cannot_issue_certificates(folder, tmp_path):
    """Whoever has server.key alone can pass for the server, but for no other host."""
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    stolen = private_key((folder / "server.key").read_bytes(), "server.key")
    pretended = new_certificate(server, stolen, key.public_key(), ["evil.example.org"], NOW)
    write_text(tmp_path / "chain", pem(pretended) + pem(server))
    write_text(tmp_path / "key", private_text(key))
    code = refusal(tmp_path / "chain", tmp_path / "key", folder / "ca.pem", "evil.example.org")
    assert code == NO_CA
    with pytest.raises(FedGPTError, match="not the certificate of a CA"):
        read_ca(pem(server).encode(), "server.pem")


def test_certificates_have_the_fields_that_browsers_and_libraries_ask_for(folder):
    ca, _ = ca_of(folder)
    server = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    assert timedelta(days=3650) <= ca.not_valid_after_utc - ca.not_valid_before_utc
    assert timedelta(days=390) < server.not_valid_after_utc - server.not_valid_before_utc
    assert server.not_valid_after_utc - server.not_valid_before_utc <= timedelta(days=397)
    usage = server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    for certificate, is_ca in ((ca, True), (server, False)):
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical and constraints.value.ca == is_ca
        assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_openssl_finds_no_fault_in_the_chain(folder):
    command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.pem"]
    done = subprocess.run(
        [*command, "server.pem"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout == "server.pem: OK\n", done.stderr


def test_sites_accept_a_renewed_certificate_with_the_ca_that_they_have(folder, tmp_path):
    shutil.copy(folder / "ca.pem", tmp_path / "site-ca.pem")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    renew(folder)
    assert {p.name for p in folder.iterdir() if before.get(p.name) != p.read_bytes()} == {
        "server.pem",
        ".lock",
    }
    connect(folder / "server.pem", folder / "server.key", tmp_path / "site-ca.pem", HOSTS[0])


def test_renewal_takes_up_the_hosts_of_server_json(folder):
    settings = folder / "server.json"
    settings.write_text(settings.read_text().replace(HOSTS[0], "moved.example.org"))
    with pytest.raises(FedGPTError) as refused:
        read_server(folder)
    advises(
        refused.value,
        "is not for the host moved.example.org of server.json; make one that is with: fedgpt keys"
        f" renew {folder}",
    )
    assert "moved.example.org" in renew(folder).certified
    connect(*files(folder), "moved.example.org")
    assert refusal(*files(folder), HOSTS[0]) == OTHER_HOST


@pytest.mark.parametrize("damage", ["expired", "another CA", "damaged", "missing"])
def test_renewal_repairs_any_certificate(folder, damage):
    ca, ca_key = ca_of(folder)
    path = folder / "server.pem"
    if damage == "expired":
        past = NOW - timedelta(days=500)
        path.write_text(pem(new_certificate(ca, ca_key, ca_key.public_key(), HOSTS, past)))
    elif damage == "another CA":
        other_key, other = new_ca(NOW)
        path.write_text(pem(new_certificate(other, other_key, ca_key.public_key(), HOSTS, NOW)))
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:300])
    else:
        path.unlink()
    renew(folder)
    connect(*files(folder), HOSTS[0])


def test_a_certificate_ends_with_its_ca_and_none_is_made_after_it(folder, tmp_path):
    ca_key, ca = new_ca(NOW - timedelta(days=3600))
    last = new_certificate(ca, ca_key, ca_key.public_key(), HOSTS, NOW)
    assert last.not_valid_after_utc == ca.not_valid_after_utc
    ca_key, ca = new_ca(NOW - timedelta(days=3651))
    with pytest.raises(FedGPTError, match="the CA ended on ") as refused:
        new_certificate(ca, ca_key, ca_key.public_key(), HOSTS, NOW)
    advises(
        refused.value,
        ": make another folder with `fedgpt keys init`, and approve a new request of each site in"
        " it",
    )
    another = deployment(tmp_path / "another", "a").folder
    write_text(tmp_path / "ca", read_kit(tmp_path / "another/a.kit").approval.ca)
    connect(another / "server.pem", another / "server.key", tmp_path / "ca", HOSTS[0])


@pytest.mark.parametrize(
    "typed, host",
    [
        ("fed.example.org", "fed.example.org"),
        ("FED.Example.ORG", "fed.example.org"),
        ("localhost", "localhost"),
        ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example"),
        ("10.0.0.5", "10.0.0.5"),
        ("2001:0DB8::0:7", "2001:db8::7"),
        ("a" * 63 + ".org", "a" * 63 + ".org"),
        ("3com.example", "3com.example"),
    ],
)
def test_a_host_has_one_form(typed, host):
    assert host_of(typed) == host_of(host) == host


@pytest.mark.parametrize(
    "typed",
    [
        *("", ".", "fed.", ".org", "a..b", "-a.org", "a-.org", "a_b.org", "*.example.org", "a b"),
        *("fed.example.org\n", "a" * 64 + ".org", "a." * 127 + "org", "münchen.example"),
        *("https://fed.example.org", "fed.example.org:9443", "[::1]", "10.0.0.5:9443", "a/b"),
        *("10.0.0.256", "10.0.5", "1", "0.0.0.0", "::", "224.0.0.1", "fe80::1%eth0", "x\0y"),
    ],
)
def test_what_is_no_host_is_refused(typed):
    with pytest.raises(ValueError, match=r"^(is|has|must be) "):
        host_of(typed)


def test_a_serial_number_below_one_is_damage_and_no_warning():
    """The library warns of it, which would be a line of its own beside our message."""
    _, ca = new_ca(NOW)
    content = bytearray(ca.public_bytes(Encoding.DER))
    serial = ca.serial_number.to_bytes((ca.serial_number.bit_length() + 7) // 8, "big")
    content[content.index(serial)] |= 0x80  # negative, as DER has it
    damaged = b64encode(bytes(content)).decode()
    text = f"-----BEGIN CERTIFICATE-----\n{damaged}\n-----END CERTIFICATE-----\n"
    with pytest.raises(FedGPTError, match=r"ca\.pem is damaged"):
        read_ca(text.encode(), "ca.pem")
