"""`fedgpt keys`: from nothing to an approved site, and all that is refused on the way."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock
from flwr.cli.supernode.register import try_load_public_key
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives import asymmetric
from flwr.superlink.federation import NoOpFederationManager
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from support.advice import advises
from support.deployment import HOSTS, deployment
from support.disk import largest_file
from support.users import become_nobody, folder_of_root

from fedgpt import cli
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.flower.deploy import documents, folder
from fedgpt.flower.deploy.certificates import new_certificate, pem
from fedgpt.flower.deploy.folder import ca_of, init
from fedgpt.flower.deploy.keys import (
    all_sites,
    approve,
    read_kit,
    read_server,
    renew_site,
    revoke,
    sites,
)
from fedgpt.flower.deploy.kit import make_request, read_request


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The folder in which everything is typed."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def typed(capsys):
    """Type `fedgpt keys ...`: the exit code, and what it printed."""

    def type_it(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        try:
            code = cli.dispatch("keys", list(words))
        except SystemExit as ended:  # argparse
            code = int(str(ended.code))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return type_it


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def changed(path: Path, **fields: object) -> None:
    """Change fields of a JSON file by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- from nothing to an approved site


def test_from_nothing_to_an_approved_site(here, typed):
    assert typed("init", "server", "--host", "fed.example.org", "--host", "10.0.0.5")[0] == 0
    code, made = typed("request", "clinic-a")
    assert code == 0
    (key,) = re.findall(r"SHA256:\S{43}", made)
    code, answer = typed("approve", "server", "clinic-a.request")
    assert code == 0 and key in answer, "both sides compare it"
    code, table = typed("list", "server")
    assert re.search(rf"^clinic-a +{re.escape(key)} .* -$", table, re.M)
    found = read_kit("clinic-a.kit")
    assert found.name == "clinic-a" and found.approval.address == "fed.example.org:9443"
    assert found.approval.ca == Path("server/ca.pem").read_text()
    assert found.approval.ca_fingerprint in answer and found.approval.ca_fingerprint in table
    assert list(sites("server")) == ["clinic-a"]


def test_files_have_the_modes_that_keep_keys_private(here):
    old = os.umask(0)  # the most open
    try:
        server = deployment(here, "a").folder
        read_kit("a.kit")
    finally:
        os.umask(old)
    assert mode(server) == 0o700
    assert {mode(path) for path in server.iterdir()} == {0o600}
    assert mode(here / "a.kit") == 0o600
    names = {"ca.key", "ca.pem", "server.key", "server.pem", "sites.json", "server.json", ".lock"}
    assert {path.name for path in server.iterdir()} == names
    assert {path.name for path in here.iterdir()} == {"server", "a.kit", "a.request", "a.approval"}


def test_a_kit_is_private_from_its_first_moment(here, monkeypatch):
    seen = []
    real = os.fsync
    monkeypatch.setattr(
        documents.os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_mode), real(handle))
    )
    make_request("a", here)
    assert seen[0] & 0o777 == 0o600


def test_only_the_files_of_the_site_have_its_private_key(here):
    server = deployment(here, "a").folder
    private = json.loads((here / "a.kit").read_text())["private_key"]
    secret = "".join(private.splitlines()[1:-1])[30:60]
    assert secret in private.replace("\n", "")
    for path in [here / "a.request", here / "a.approval", *server.iterdir()]:
        assert secret not in path.read_text().replace("\n", "").replace("\\n", "")
    assert secret not in repr(read_kit(here / "a.kit"))


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not installed")
def test_fingerprints_are_those_of_ssh_keygen(here):
    made = make_request("a", here)
    key = documents.public_key(made.public_key, "a")
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (here / "key.pub").write_bytes(line)
    done = subprocess.run(
        ["ssh-keygen", "-l", "-f", "key.pub"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1] == made.fingerprint


def test_flower_takes_the_keys(here):
    server = deployment(here, "a").folder
    found = read_kit("a.kit")
    public = found.private_key.public_key()
    (registered,) = sites(server).values()
    assert registered == asymmetric.public_key_to_bytes(public)
    assert asymmetric.uses_nist_ec_curve(asymmetric.bytes_to_public_key(registered))
    text = json.loads((here / "a.kit").read_text())["private_key"].encode()
    signature = asymmetric.sign_message(asymmetric.bytes_to_private_key(text), b"now")
    assert asymmetric.verify_signature(public, b"now", signature)
    openssh = found.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    (here / "key").write_bytes(openssh)
    arguments = Namespace(auth_supernode_private_key="key", auth_supernode_public_key=None)
    pair = _try_setup_client_authentication(arguments)
    assert pair is not None and pair[1] == public
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (here / "key.pub").write_bytes(line)
    assert try_load_public_key(here / "key.pub") == registered


def test_flower_never_takes_a_key_twice(here):
    """That is why a key that was replaced or revoked is refused here, too."""
    (key,) = sites(deployment(here, "a").folder).values()
    manager, store = NoOpFederationManager(simulation=False), ObjectStoreFactory()
    state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, manager, store).state()
    node = state.create_node("o", "o", key, 10)
    state.delete_node("o", node)
    with pytest.raises(ValueError, match="already in use"):
        state.create_node("o", "o", key, 10)


# ---- init


@pytest.mark.parametrize("what", ["server", "file", "folder with a file", "link", "broken link"])
def test_init_never_replaces_what_exists(here, typed, what):
    path = here / "server"
    if what == "server":
        init(path, HOSTS)
    elif what == "file":
        path.write_text("mine")
    elif what == "folder with a file":
        path.mkdir()
        (path / "mine").touch()
    else:
        path.symlink_to(here / "elsewhere")
        if what == "link":
            (here / "elsewhere").mkdir()
    before = sorted(map(str, here.rglob("*")))
    code, printed = typed("init", "server", "--host", "a.org")
    assert code == 2 and "server: exists and is never replaced" in printed
    assert sorted(map(str, here.rglob("*"))) == before
    advises(printed, "; name a folder that is new or empty")
    (here / "empty").mkdir()
    for name in ("new", "empty"):
        assert typed("init", name, "--host", "a.org")[0] == 0


def test_init_fills_an_empty_folder(here, typed):
    (here / "server").mkdir(mode=0o755)
    assert typed("init", "server", "--host", "a.org")[0] == 0
    assert mode(here / "server") == 0o700 and read_server("server").hosts == ("a.org",)


@pytest.mark.parametrize(
    "words, problems",
    [
        ([], ["--host: name at least one"]),
        (["--host", "a_b"], ["--host a_b: must be a host name"]),
        (["--host", "a.org:9443"], ["--host a.org:9443: must be a name or an IP address alone"]),
        (["--host", "0.0.0.0"], ["--host 0.0.0.0: is not an address that clients can connect to"]),
        (["--host", "a.org", "--port", "0"], ["--port 0: must be from 1 to 65535"]),
        (["--host", "a.org", "--port", "65536"], ["--port 65536: must be from 1 to 65535"]),
        (["--host", "a.org", "--port", "-1"], ["--port -1: must be from 1 to 65535"]),
        (["--host", "*", "--host", "1.2.3", "--port", "0"], ["--host *", "--host 1.2.3", "--port"]),
        (["--host", "a.org", "--port", "x"], ["argument --port: invalid int value: 'x'"]),
    ],
)
def test_init_names_each_wrong_host_and_port_as_typed(here, typed, words, problems):
    code, printed = typed("init", "server", *words)
    assert code == 2 and all(problem in printed for problem in problems), printed
    assert not list(here.iterdir())


# words that are refused, the advice, and the words that it leads to
INIT_REMEDIES = [
    (
        [],
        "--host: name at least one host name or IP address by which clients reach the server",
        ["--host", "fed.example.org"],
    ),
    (
        ["--host", "0.0.0.0"],
        "is not an address that clients can connect to; type the machine's own",
        ["--host", "10.0.0.5"],
    ),
    (
        ["--host", "m\N{LATIN SMALL LETTER U WITH DIAERESIS}nchen.example"],
        "has other letters than a to z; type it in the form that begins with xn--",
        ["--host", "m\N{LATIN SMALL LETTER U WITH DIAERESIS}nchen.example".encode("idna").decode()],
    ),
]


@pytest.mark.parametrize("words, advice, better", INIT_REMEDIES)
def test_the_advice_on_a_host_helps(here, typed, words, advice, better):
    code, printed = typed("init", "server", *words)
    assert code == 2 and advice in printed
    assert typed("init", "server", *better)[0] == 0
    assert better[1] in read_server("server").certified


def test_an_address_is_in_the_form_that_flower_takes(here):
    for number, (hosts, address) in enumerate(
        [(["2001:db8::7"], "[2001:db8::7]:7"), (["A.org"], "a.org:7"), (["10.0.0.5"], "10.0.0.5:7")]
    ):
        server = init(here / str(number), hosts, port=7).folder
        make_request(f"a{number}", here)
        approve(server, f"a{number}.request")
        assert read_kit(f"a{number}.kit").approval.address == address


def test_a_full_disk_leaves_no_part_of_a_folder_or_kit(here, typed):
    with largest_file(300):
        code, printed = typed("init", "server", "--host", "a.org")
        assert code == 1 and "server cannot be made: File too large" in printed
        code, printed = typed("request", "a")
        assert code == 1 and "a.kit and a.request cannot be written: File too large" in printed
    assert not list(here.iterdir())


# ---- request


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "x" * 64, "a..b", "con", "a.kit"])
def test_names_of_sites(here, typed, name):
    assert typed("request", name)[0] == 0
    assert read_request(f"{name}.request").name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".a",
        "_a",
        "../a",
        "a/b",
        "/a",
        "a b",
        "a\n",
        "ä",
        "x" * 65,
        "a\0",
        "٣",
        "a,b",
    ],
)
def test_other_names_are_refused(here, typed, name):
    code, printed = typed("request", "--", name)
    assert code == 2 and f"{name!r}: a site's name has at most 64 letters" in printed
    assert not list(here.iterdir())


def test_an_existing_kit_is_never_overwritten(here, typed):
    make_request("a", here)
    before = [(here / name).read_bytes() for name in ("a.kit", "a.request")]
    code, printed = typed("request", "a")
    assert code == 2 and "a.kit: exists and is never replaced" in printed
    assert before == [(here / name).read_bytes() for name in ("a.kit", "a.request")]
    advises(
        printed,
        "; name another folder with --dir, or move the kit away if its key is no longer in use",
    )
    assert typed("request", "a", "--dir", "other/one")[0] == 0
    assert (here / "other/one/a.kit").exists()
    (here / "a.kit").rename(here / "old.kit")
    assert typed("request", "a")[0] == 0
    assert (here / "old.kit").read_bytes() == before[0] != (here / "a.kit").read_bytes()


@pytest.mark.parametrize("kind", ["link", "broken link", "folder"])
def test_whatever_has_the_name_of_a_kit_stays(here, typed, kind):
    if kind == "folder":
        (here / "a.kit").mkdir()
    else:
        (here / "a.kit").symlink_to("target")
        if kind == "link":
            (here / "target").write_text("mine")
    code, printed = typed("request", "a")
    assert code == 2 and "never replaced" in printed
    assert not (here / "target").exists() or (here / "target").read_text() == "mine"
    assert not (here / "a.request").exists()


def test_a_request_that_cannot_be_written_leaves_no_kit(here, typed):
    (here / "a.request").mkdir()
    code, printed = typed("request", "a")
    assert code == 1 and "cannot be written: Is a directory" in printed
    assert not (here / "a.kit").exists()
    (here / "file").touch()
    for place in ("/proc/none", "file", "file/none"):
        code, printed = typed("request", "b", "--dir", place)
        assert code == 1 and f"{place}/b.kit and b.request cannot be written" in printed


def test_a_home_folder_that_does_not_exist_is_named(here, typed):
    make_request("a", here)
    missing = "~no-such-user/x"
    for words in (
        *(["init", missing, "--host", "a.org"], ["request", "a", "--dir", missing]),
        *(["approve", missing, "a.request"], ["renew", missing], ["list", missing]),
    ):
        code, printed = typed(*words)
        assert code == 2 and f"{missing}: there is no such home folder" in printed
    with pytest.raises(ConfigError, match="no such home folder"):
        read_kit(missing)


# ---- approve


def test_a_known_name_or_key_is_refused(here, typed):
    server = deployment(here, "a", "b").folder
    make_request("a", here / "new")
    make_request("A", here / "case")
    renamed(here / "a.kit", "c")
    before = (server / "sites.json").read_bytes()
    for request, problem in [
        ("a.request", "the site a, approved at 20"),
        ("new/a.request", "has this name"),
        ("case/A.request", "the site a, approved at"),
        ("c.request", "has this key"),
    ]:
        code, printed = typed("approve", "server", request, "--out", "new")
        assert code == 2 and problem in printed, printed
        assert f"fedgpt keys renew server {request}" in printed
    assert (server / "sites.json").read_bytes() == before
    assert not list((here / "new").glob("*.approval"))


def renamed(path: Path, name: str) -> None:
    """A request for another name by who has the key of a kit."""
    key = asymmetric.bytes_to_private_key(json.loads(path.read_text())["private_key"].encode())
    request = json.loads(path.read_text())["request"] | {"name": name}
    path.with_name(f"{name}.request").write_text(json.dumps(documents.signed(request, key)))


def test_a_request_must_be_signed_with_the_key_in_it(here, typed):
    """Otherwise a site could take the name of another, or the key of another for its own name."""
    server = init(here / "server", HOSTS).folder
    make_request("a", here)
    make_request("b", here)
    a, b = (json.loads((here / f"{name}.request").read_text()) for name in "ab")
    for forged in (
        a | {"name": "c"},
        a | {"public_key": b["public_key"]},
        a | {"signature": b["signature"]},
        a | {"made": b["made"].replace("20", "19")},
        a | {"signature": ""},
        a | {"signature": "not base64"},
    ):
        (here / "forged.request").write_text(json.dumps(forged))
        code, printed = typed("approve", "server", "forged.request")
        assert code == 1 and "its signature does not fit" in printed
    assert all_sites(server) == {}


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP521R1, ec.BrainpoolP384R1])
def test_only_keys_of_the_curve_p_384_are_approved(here, typed, curve):
    init(here / "server", HOSTS)
    key = ec.generate_private_key(curve())
    fields = {"name": "a", "public_key": documents.public_text(key.public_key())}
    content = documents.written("request", fields | {"made": documents.now()})
    (here / "a.request").write_text(json.dumps(documents.signed(content, key)))
    code, printed = typed("approve", "server", "a.request")
    assert code == 1 and "not an EC key of the curve P-384" in printed


def test_a_signed_request_with_a_bad_name_is_refused(here, typed):
    init(here / "server", HOSTS)
    make_request("a", here)
    key = asymmetric.bytes_to_private_key(
        json.loads((here / "a.kit").read_text())["private_key"].encode()
    )
    for name in ("../../etc/cron.d/x", "", "x" * 65, "\ud800", "a\n"):
        bad = json.loads((here / "a.request").read_text()) | {"name": name}
        (here / "bad.request").write_text(json.dumps(documents.signed(bad, key)))
        code, printed = typed("approve", "server", "bad.request")
        assert code == 1 and "a site's name has at most 64 letters" in printed
    assert all_sites("server") == {}


def test_the_wrong_kind_of_file_is_named(here, typed):
    deployment(here, "a")
    for name, kind in (("a.kit", "kit"), ("a.approval", "approval")):
        code, printed = typed("approve", "server", name)
        assert code == 1 and f"{name} is not a site's request, but its {kind}" in printed
    with pytest.raises(FedGPTError, match=r"a\.request is not a site's kit, but its request"):
        (here / "a.request").chmod(0o600)
        read_kit(here / "a.request")


def test_a_failure_to_write_the_approval_approves_nobody(here, typed):
    server = init(here / "server", HOSTS).folder
    make_request("a", here)
    code, printed = typed("approve", "server", "a.request", "--out", "nowhere")
    assert code == 2
    advises(printed, "--out nowhere: is not a folder; name one that exists")
    (here / "full" / "a.approval").mkdir(parents=True)
    code, printed = typed("approve", "server", "a.request", "--out", "full")
    assert code == 1 and "full/a.approval cannot be written: Is a directory" in printed
    assert all_sites(server) == {}
    (here / "there").mkdir()
    assert typed("approve", "server", "a.request", "--out", "there")[0] == 0
    assert (here / "there" / "a.approval").is_file()


def test_an_approval_after_a_full_disk_is_repeated(here, typed):
    """The list of sites is the file that does not fit; the approval has been written before."""
    server = deployment(here, *"abcdef").folder
    make_request("g", here)
    before = (server / "sites.json").read_bytes()
    with largest_file(len(before) + 100):
        code, printed = typed("approve", "server", "g.request")
    assert code == 1 and "server cannot be changed: File too large" in printed
    assert (server / "sites.json").read_bytes() == before
    assert not list(server.glob(".sites*"))
    assert typed("approve", "server", "g.request")[0] == 0
    assert read_kit("g.kit").name == "g"


# ---- revoke and renew


def test_a_revoked_site_is_shut_out_and_its_key_does_not_come_back(here, typed):
    server = deployment(here, "a", "b").folder
    assert typed("revoke", "server", "a")[0] == 0
    assert list(sites(server)) == ["b"] and all_sites(server)["a"].revoked
    code, table = typed("list", "server")
    assert re.search(r"^a .* 20\S+  20\S+$", table, re.M)
    for command in ("approve", "renew"):
        assert typed(command, "server", "a.request")[0] == 2
    renamed(here / "a.kit", "c")
    assert typed("approve", "server", "c.request")[0] == 2
    assert list(sites(server)) == ["b"]
    code, printed = typed("revoke", "server", "a")
    assert code == 2 and "a: was revoked already, at 20" in printed
    code, printed = typed("revoke", "server", "clinic")
    assert code == 2 and "clinic: there is no site 'clinic'" in printed


def test_who_approves_a_revoked_site_again_is_told_how_it_comes_back(here, typed):
    """Each step that is named is accepted."""
    server = deployment(here, "a").folder
    revoke(server, "a")
    code, printed = typed("approve", "server", "a.request")
    assert code == 2 and " and revoked at 20" in printed and "cannot come back" in printed
    assert "keys renew" not in printed  # with this request it would be refused
    advises(printed, "the site makes a new one with: fedgpt keys request a")
    make_request("a", here / "new")
    code, printed = typed("approve", "server", "new/a.request")
    assert code == 2 and " and revoked at 20" in printed
    advises(printed, "with: fedgpt keys renew server new/a.request")
    assert typed("renew", "server", "new/a.request", "--out", "new")[0] == 0
    # a key that was replaced is not revoked, and does not come back either
    code, printed = typed("approve", "server", "a.request")
    assert code == 2 and "keys renew" not in printed and "revoked" not in printed
    advises(printed, "fedgpt keys request a")


@pytest.mark.parametrize("revoked", [False, True])
def test_a_new_key_takes_the_place_of_the_old_one(here, typed, revoked):
    server = deployment(here, "a", "b").folder
    old = sites(server)["a"]
    if revoked:
        revoke(server, "a")
    make_request("a", here / "new")
    code, printed = typed("renew", "server", "new/a.request", "--out", "new")
    assert code == 0 and ("was revoked at" in printed) == revoked
    now = sites(server)
    assert list(now) == ["a", "b"] and now["a"] != old
    assert now["a"].decode() == read_request("new/a.request").public_key
    assert read_kit("new/a.kit").name == "a"
    for command in ("approve", "renew"):  # the old key, after it was replaced
        assert typed(command, "server", "a.request")[0] == 2
    renamed(here / "a.kit", "c")
    assert typed("approve", "server", "c.request")[0] == 2
    assert sites(server) == now


def test_a_site_gets_its_approval_once_more(here, typed):
    server = deployment(here, "a").folder
    (here / "a.approval").unlink()
    before = (server / "sites.json").read_bytes()
    code, printed = typed("renew", "server", "a.request")
    assert code == 0 and "written once more" in printed
    assert json.loads((server / "sites.json").read_bytes()) == json.loads(before)
    assert read_kit("a.kit").approval.address == "fed.example.org:9443"


def test_only_a_known_site_renews_its_key_and_with_one_of_its_own(here, typed):
    deployment(here, "clinic-a", "clinic-b")
    make_request("clinic-c", here)
    code, printed = typed("renew", "server", "clinic-c.request")
    assert code == 2 and "no site 'clinic-c'; did you mean 'clinic-b' or 'clinic-a'?" in printed
    (here / "of-a").mkdir()
    shutil.copy("clinic-a.kit", "of-a")
    renamed(here / "of-a/clinic-a.kit", "clinic-b")
    code, printed = typed("renew", "server", "of-a/clinic-b.request")
    assert code == 2 and "this key is or was that of the site clinic-a" in printed


def test_the_certificate_is_renewed_without_the_sites(here, typed):
    server = deployment(here, "a").folder
    before = (server / "server.pem").read_bytes()
    code, printed = typed("renew", "server")
    assert code == 0 and "sites need nothing new" in printed
    assert (server / "server.pem").read_bytes() != before and list(sites(server)) == ["a"]


# ---- list


@pytest.mark.parametrize(
    "days, line",
    [
        (31, ""),
        (29, "warning      the certificate ends in 28 days"),
        (1, "warning      the certificate ends in 0 days"),
        (-1, "warning      the certificate has ended"),
    ],
)
def test_the_list_warns_before_the_certificate_ends(here, typed, days, line):
    server = deployment(here, "a").folder
    ca, ca_key = ca_of(server)
    key = documents.private_key((server / "server.key").read_bytes(), "key").public_key()
    made = datetime.now(UTC) + timedelta(days=days - 396)
    (server / "server.pem").write_text(pem(new_certificate(ca, ca_key, key, HOSTS, made)))
    code, table = typed("list", "server")
    assert code == 0 and re.search(r"^a  ", table, re.M)
    assert (line in table) if line else ("warning" not in table)
    assert not line or "renew it with: fedgpt keys renew server" in table


def test_the_list_says_when_renewal_cannot_help(here, typed, monkeypatch):
    """In another folder a new request of each site is approved, as kits stay with their CA."""
    real = folder.certificates.new_ca
    early = timedelta(days=3640)
    monkeypatch.setattr(folder.certificates, "new_ca", lambda now: real(now - early))
    deployment(here, "a")
    _, table = typed("list", "server")
    assert "warning      the CA ends in 9 days" in table
    advises(table.strip(), "make another folder, and approve a new request of each site in it")
    read_kit("a.kit")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert typed("init", "another", "--host", HOSTS[0])[0] == 0
    assert typed("request", "a", "--dir", "new")[0] == 0
    assert typed("approve", "another", "new/a.request", "--out", "new")[0] == 0
    assert read_kit("new/a.kit").approval.ca == (here / "another/ca.pem").read_text()
    assert "warning" not in typed("list", "another")[1]


# ---- a kit and its approval


def test_an_approval_is_joined_into_the_kit_and_said_so(here, caplog):
    deployment(here, "a")
    (here / "a.kit").rename(here / "any name")
    first = read_kit("any name")
    assert "any name now has the approval of the server fed.example.org:9443" in caplog.text
    assert first.approval.ca_fingerprint in caplog.text
    assert mode(here / "any name") == 0o600
    (here / "a.approval").unlink()
    caplog.clear()
    again = read_kit("any name")
    assert again.approval == first.approval and not caplog.text


def test_a_kit_without_an_approval_says_what_to_do(here):
    make_request("a", here)
    before = (here / "a.kit").read_bytes()
    with pytest.raises(FedGPTError) as refused:
        read_kit("a.kit")
    advises(
        refused.value,
        "a.kit is not approved: give a.request to the operator of the server, and put a.approval,"
        " which comes back, into the folder of the kit",
    )
    assert (here / "a.kit").read_bytes() == before
    operator = here / "operator"
    operator.mkdir()
    shutil.move(here / "a.request", operator)
    approve(init(operator / "server", HOSTS).folder, operator / "a.request", operator)
    shutil.move(operator / "a.approval", here)
    assert read_kit("a.kit").approval.hosts == HOSTS


def test_an_approved_kit_stays_with_its_ca(here):
    deployment(here, "a")
    found = read_kit("a.kit")
    other = init(here / "other", ["evil.example.org"]).folder
    approve(other, "a.request")
    assert read_kit("a.kit").approval == found.approval


# what is wrong with an approval: what is replaced in it, and the reason that is given
WRONG_APPROVALS = {
    "of another name": ("other/b.approval", "is for the site 'b', and the kit is that of 'a'"),
    "for another key": ("other/a.approval", r"is for the key SHA256:\S+, and the kit has the key"),
    "of another CA": ({"ca": "other/server/ca.pem"}, "its signature does not fit"),
    "with another host": ({"hosts": ["evil.example.org"]}, "its signature does not fit"),
    "of the server's key": ({"ca": "server/server.pem"}, "not the certificate of a CA"),
    "signed, with a bad host": ({"hosts": ["a b"]}, "hosts: 'a b' must be a host name"),
    "signed, with a bad port": ({"port": 0}, "port: 0 must be from 1 to 65535"),
    "signed, of another format": ({"format": 2}, "has format 2, and this version .* format 1"),
}


@pytest.mark.parametrize("case", WRONG_APPROVALS)
def test_a_wrong_approval_is_not_joined(here, case):
    deployment(here, "a")
    deployment(here / "other", "a", "b")
    wrong, reason = WRONG_APPROVALS[case]
    if isinstance(wrong, str):
        content = json.loads((here / wrong).read_text())
    else:
        content = json.loads((here / "a.approval").read_text()) | wrong
        if "ca" in wrong:
            content["ca"] = (here / content["ca"]).read_text()
        if case.startswith("signed"):
            content = documents.signed(content, ca_of(here / "server")[1])
        elif "server's key" in case:
            key = documents.private_key((here / "server/server.key").read_bytes(), "key")
            content = documents.signed(content, key)
    (here / "a.approval").write_text(json.dumps(content))
    before = (here / "a.kit").read_bytes()
    with pytest.raises(FedGPTError, match=rf"a\.approval.*{reason}"):
        read_kit("a.kit")
    assert (here / "a.kit").read_bytes() == before
    changed(here / "a.kit", approval=content)  # nor is it used where it is in the kit already
    with pytest.raises(FedGPTError, match=rf"the approval in a\.kit.*{reason}"):
        read_kit("a.kit")


def test_an_approval_that_is_a_link_is_not_followed(here):
    deployment(here, "a")
    (here / "a.approval").rename(here / "elsewhere")
    (here / "a.approval").symlink_to(here / "elsewhere")
    with pytest.raises(FedGPTError, match=r"a\.approval is a symbolic link"):
        read_kit("a.kit")


def test_a_kit_cannot_take_the_name_or_key_of_another(here):
    deployment(here, "a", "b")
    a, b = (json.loads((here / f"{name}.kit").read_text()) for name in "ab")
    for mixed in (
        a | {"request": b["request"]},
        a | {"private_key": b["private_key"]},
        a | {"request": a["request"] | {"name": "b"}},
    ):
        (here / "a.kit").write_text(json.dumps(mixed))
        with pytest.raises(FedGPTError, match=r"a\.kit .*(has not the private key|signature)"):
            read_kit("a.kit")


def test_a_full_disk_keeps_the_kit(here):
    deployment(here, "a")
    before = (here / "a.kit").read_bytes()
    with largest_file(1000), pytest.raises(FedGPTError, match="cannot be written: File too large"):
        read_kit("a.kit")
    assert (here / "a.kit").read_bytes() == before
    assert not list(here.glob(".a.kit*"))


# ---- who may read the files

PRIVATE_FILES = ["a.kit", "server", *(f"server/{name}" for name in folder.FILES)]


def read_all(here: Path) -> None:
    read_kit(here / "a.kit")
    read_server(here / "server")
    sites(here / "server")
    ca_of(here / "server")


@pytest.mark.parametrize("name", PRIVATE_FILES)
@pytest.mark.parametrize("bits", [0o040, 0o004, 0o020, 0o002, 0o010, 0o001])
def test_a_file_that_is_open_to_others_is_refused(here, name, bits):
    deployment(here, "a")
    path = here / name
    path.chmod(mode(path) | bits)
    allowed = 700 if path.is_dir() else 600
    with pytest.raises(FedGPTError, match=rf"{name} has mode 0[67]\d\d, .* chmod {allowed} "):
        read_all(here)
    path.chmod(0o700 if path.is_dir() else 0o600)
    read_all(here)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("name", PRIVATE_FILES)
def test_a_file_of_another_user_is_refused(here, name):
    deployment(here, "a")
    os.chown(here / name, 65534, -1)
    with pytest.raises(FedGPTError, match=f"{name} belongs to user 65534, .* user 0"):
        read_all(here)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_owner_of_a_file_may_read_it(monkeypatch):
    with folder_of_root() as place:
        monkeypatch.chdir(place)
        place.chmod(0o777)
        become_nobody()
        deployment(Path(), "a")
        os.seteuid(0)
        with pytest.raises(FedGPTError) as refused:
            read_kit("a.kit")
        advises(refused.value, "and this command runs as user 0; run it as the owner")
        become_nobody()
        read_all(Path())


@pytest.mark.parametrize("name", PRIVATE_FILES)
def test_a_symbolic_link_is_refused(here, name):
    deployment(here, "a")
    (here / name).rename(here / "moved")
    (here / name).symlink_to(here / "moved")
    with pytest.raises(FedGPTError, match=f"{name} is a symbolic link") as refused:
        read_all(here)
    if name == "server":
        advises(refused.value, "is a symbolic link; name the folder of a server")
        read_server(here / "moved")
    else:
        advises(refused.value, f"{name} is a symbolic link; put the file itself there")
        (here / "moved").replace(here / name)
        read_all(here)


@pytest.mark.parametrize("name", [one for one in PRIVATE_FILES if one != "server"])
@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "pipe", "huge", "device"])
def test_what_is_no_file_of_this_kind_is_refused(here, name, kind):
    deployment(here, "a")
    path = here / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind != "missing":
        path.touch(mode=0o600)
        os.truncate(path, 0 if kind == "empty" else documents.LARGEST + 1)
    reasons = {"empty": "is empty", "folder": "is not a file", "huge": "has more than 16,777,216"}
    with pytest.raises(FedGPTError, match=f"{name} .*{reasons.get(kind, '')}"):
        read_all(here)


def test_what_is_closed_to_this_user_is_named(typed, monkeypatch):
    """As a user without root's right to read everything."""
    with folder_of_root() as place:
        monkeypatch.chdir(place)
        place.chmod(0o777)
        become_nobody()
        init("server", HOSTS)
        make_request("a", ".")
        Path("closed").mkdir(mode=0o000)
        Path("full").mkdir(mode=0o500)
        for words, problem in [
            (["request", "b", "--dir", "closed"], "closed/b.kit cannot be read"),
            (["request", "b", "--dir", "full"], "full/b.kit and b.request cannot be written"),
            (["init", "closed/server", "--host", "a.org"], "closed/server cannot be read"),
            (["init", "full/server", "--host", "a.org"], "full/server cannot be made"),
            (["init", "closed", "--host", "a.org"], "closed: exists and is never replaced"),
            (["list", "closed/server"], "closed/server cannot be read"),
            (["approve", "server", "closed/a.request"], "closed/a.request cannot be read"),
            (["approve", "server", "a.request", "--out", "full"], "full/a.approval cannot be"),
            (["approve", "server", "a.request", "--out", "closed/x"], "closed/x/a.approval cannot"),
        ]:
            code, printed = typed(*words)
            assert code in (1, 2) and problem in printed, printed
        assert all_sites("server") == {}
        Path("server").chmod(0o500)
        for words in (["approve", "server", "a.request"], ["renew", "server"]):
            code, printed = typed(*words)
            assert code == 1 and "server cannot be changed: Permission denied" in printed


@pytest.mark.parametrize("command", ["list", "revoke", "renew", "approve"])
def test_a_folder_that_is_none_is_named(here, typed, command):
    make_request("a", here)
    more = {"revoke": ["a"], "approve": ["a.request"]}.get(command, [])
    for name in ("nowhere", "a.request"):
        code, printed = typed(command, name, *more)
        assert code == 1 and f"fedgpt: {name} " in printed
    (here / "empty").mkdir(mode=0o700)
    code, printed = typed(command, "empty", *more)
    assert code == 1 and "No such file" in printed


# ---- two operators at once

OPERATOR = """
import sys
from fedgpt.flower.deploy.keys import approve, revoke
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[1:]:
    approve("server", f"{name}.request") if name[0] != "r" else revoke("server", name)
"""


def test_operators_at_once_lose_nothing(here):
    deployment(here, "r0", "r1", "r2")
    new = [f"a{i}" for i in range(6)]
    for name in new:
        make_request(name, here)
    operators = [
        subprocess.Popen(
            [sys.executable, "-c", OPERATOR, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for names in (new[:4], ["r0", new[4], "r1", new[5], "r2"])
    ]
    for one in operators:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in operators:
        assert one.stdin is not None
        print("go", file=one.stdin, flush=True)
    for one in operators:
        one.communicate(timeout=60)
    assert [one.returncode for one in operators] == [0, 0]
    assert set(sites("server")) == set(new)
    assert set(all_sites("server")) - set(new) == {"r0", "r1", "r2"}


def test_of_two_requests_with_one_name_one_is_approved(here):
    init(here / "server", HOSTS)
    for who in "xy":
        make_request("a", here / who)
    refused = []

    def operator(who: str) -> None:
        try:
            approve(here / "server", here / who / "a.request", here / who)
        except ConfigError:
            refused.append(who)

    threads = [threading.Thread(target=operator, args=[who]) for who in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (loser,) = refused
    winner = "y" if loser == "x" else "x"
    assert all_sites("server")["a"].public_key == read_request(f"{winner}/a.request").public_key


def test_a_command_that_holds_the_folder_is_waited_for_and_then_named(here, typed, monkeypatch):
    server = deployment(here, "a").folder
    monkeypatch.setattr(folder, "PATIENCE", 0.2)
    with FileLock(server / ".lock"):
        for words in (["revoke", "server", "a"], ["renew", "server"]):
            code, printed = typed(*words)
            assert code == 1 and "another command has been changing this folder" in printed
        assert typed("list", "server")[0] == 0, "reading waits for nobody"
    assert typed("revoke", "server", "a")[0] == 0


# ---- help


@pytest.mark.parametrize("command", ["init", "request", "approve", "revoke", "renew", "list"])
def test_each_command_has_help_that_imports_nothing_large(command):
    code = (
        f"import sys; sys.argv = ['fedgpt', 'keys', {command!r}, '--help'];"
        "from fedgpt.__main__ import main; import atexit;"
        "atexit.register(lambda: print({'cryptography', 'flwr', 'torch'} & set(sys.modules)));"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: fedgpt keys {command} [-h]" in done.stdout
    assert done.stdout.endswith("set()\n")


def test_a_command_that_does_not_exist_is_refused(typed):
    code, printed = typed("aprove", "server")
    assert code == 2 and "invalid choice: 'aprove'" in printed
    assert typed()[0] == 2


def test_keys_needs_nothing_of_flower():
    code = "import sys, fedgpt.flower.deploy.keys; assert not {'flwr', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_messages_of_other_formats_name_both(here):
    deployment(here, "a")
    for path, read in (
        (here / "a.kit", lambda: read_kit("a.kit")),
        (here / "server/server.json", lambda: read_server("server")),
        (here / "server/sites.json", lambda: sites("server")),
        (here / "a.request", lambda: renew_site("server", "a.request")),
    ):
        good = path.read_bytes()
        for number in (2, 0, -1):
            changed(path, format=number)
            with pytest.raises(FedGPTError) as refused:
                read()
            advises(
                refused.value,
                f"{path.name} has format {number}, and this version of fedgpt reads format 1; use"
                " the version that wrote it, or update fedgpt",
            )
        for other in (True, 1.0, "1", None):
            changed(path, format=other)
            with pytest.raises(FedGPTError, match="has no format number"):
                read()
        path.write_bytes(good)
        read()


def test_a_version_of_another_format_reads_it(here, monkeypatch):
    """As the refusal of another format advises: a version that writes format 2 reads format 2."""
    with monkeypatch.context() as later:
        later.setattr(documents, "FORMAT", 2)
        deployment(here, "a")
        read_all(here)
    with pytest.raises(FedGPTError, match="has format 2, and this version"):
        read_all(here)
