"""Files that are cut, or changed in a bit or a value: an error, or the same content as before.

Never a traceback, never a changed file, and never a key that the operator has not approved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.deployment import HOSTS, deployment

from fedgpt import cli
from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy import folder
from fedgpt.flower.deploy.documents import public_text
from fedgpt.flower.deploy.folder import ca_of, read_server
from fedgpt.flower.deploy.keys import all_sites, approve, read_kit, renew_site, revoke, sites
from fedgpt.flower.deploy.kit import make_request, read_request

OTHERS: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**70,
    1.5,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [[]],
    {},
    {"": 0},
]
KIT, NEW_KIT, REQUEST, APPROVAL = "a.kit", "b.kit", "b.request", "b.approval"
NEW = {
    "public_key": public_text(ec.generate_private_key(ec.SECP384R1()).public_key()),
    "approved": "2026-01-01T00:00:00+00:00",
    "revoked": None,
}
P_256 = public_text(ec.generate_private_key(ec.SECP256R1()).public_key())
Damage = Callable[[bytes], bytes]
T = TypeVar("T")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Site a is in the list and has an approved kit, b an approval beside its kit, c is revoked and
    d has a second key.
    """
    here = tmp_path_factory.mktemp("place")
    server = deployment(here, *"abcd").folder
    read_kit(here / KIT)
    (here / "a.approval").unlink()  # of which the kit took a copy, and would take another one
    revoke(server, "c")
    make_request("d", here / "new")
    renew_site(server, here / "new/d.request", here / "new")
    return here


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    yield path
    if isinstance(content, dict | list):
        steps = content.items() if isinstance(content, dict) else enumerate(content)
        for step, value in steps:
            yield from places(value, (*path, step))


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = put(content[path[0]], path[1:], value)
    return copy


def taken_out(content: Any, path: tuple[Any, ...]) -> Any:
    if len(path) == 1:
        copy = dict(content) if isinstance(content, dict) else list(content)
        del copy[path[0]]
        return copy
    return put(content, path[:1], taken_out(content[path[0]], path[1:]))


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """What happens to a file: cut, bits flipped, bytes put in, a value replaced or taken out."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "swap", "replace", "remove", "twice"]))
    where = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3))
    bit, value = draw(st.integers(0, 7)), draw(st.sampled_from(OTHERS))
    some = draw(st.binary(min_size=1, max_size=8))

    def damage(good: bytes) -> bytes:
        found = bytearray(good)
        at = int(where[0] * len(good))
        if kind == "cut":
            return good[:at]
        if kind == "insert":
            return good[:at] + some + good[at:]
        if kind == "flip":
            for one in where:
                found[int(one * len(good))] ^= 1 << bit
            return bytes(found)
        if kind == "swap":
            other = int(where[-1] * len(good))
            found[at], found[other] = found[other], found[at]
            return bytes(found)
        return _of_json(good, kind, where[0], value)

    return damage


def _of_json(good: bytes, kind: str, where: float, value: Any) -> bytes:
    try:
        content = json.loads(good)
    except ValueError:  # a PEM file
        return good[: int(where * len(good))]
    every = list(places(content))
    path = every[int(where * len(every))]
    if kind == "replace" or not path:
        return json.dumps(put(content, path, value)).encode()
    if kind == "remove":
        return json.dumps(taken_out(content, path)).encode()
    name = json.dumps(path[-1]).encode()  # a name that stands twice, with another value
    return good.replace(name + b":", name + b": " + json.dumps(value).encode() + b"," + name + b":")


@contextmanager
def damaged(path: Path, damage: Damage) -> Iterator[bytes]:
    """`path` with damaged content in the block, which does not change it."""
    good = path.read_bytes()
    try:
        path.write_bytes(bad := damage(good))
        yield bad
        assert path.read_bytes() == bad, "a damaged file stays as it is, for whoever looks at it"
    finally:
        path.write_bytes(good)


def outcome(read: Callable[[], T], secrets: list[str]) -> T | None:
    """What was read, or the message, which says nothing that is secret."""
    try:
        return read()
    except FedGPTError as error:
        message = str(error)
        assert len(message) < 1000 and not any(secret in message for secret in secrets), message
        return None


def secrets_of(*paths: Path) -> list[str]:
    """The lines of private keys."""
    text = "\n".join(path.read_text() for path in paths).replace("\\n", "\n")
    lines = [line for line in text.splitlines() if len(line) > 40 and " " not in line]
    assert lines
    return [line[i : i + 12] for line in lines for i in range(0, len(line) - 12, 6)]


many = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@many
@given(damages())
@example(lambda good: b"[" * 100_000)
@example(lambda good: b'{"format": ' + b"9" * 10_000 + b"}")
@example(lambda good: good[: good.index(b"PRIVATE") + 40])
@example(lambda good: b"\xff\xfe" + good)
@example(lambda good: b"NaN")
@example(lambda good: json.dumps(put(json.loads(good), ("approval",), None)).encode())
def test_a_kit(place, damage):
    path = place / KIT
    good, secrets = read_kit(path), secrets_of(path)
    with damaged(path, damage):
        found = outcome(lambda: read_kit(path), secrets)
    if found is not None:  # blanks, or bits of the PEM text that have no meaning
        assert found.name == good.name and found.approval == good.approval
        assert found.private_key.private_numbers() == good.private_key.private_numbers()


@many
@given(damages())
def test_a_request(place, damage):
    path = place / REQUEST
    good = read_request(path)
    before = (place / "server/sites.json").read_bytes()
    with damaged(path, damage):
        found = outcome(lambda: read_request(path), [])
        assert found in (None, good)
        for command in (approve, renew_site) if found is None else ():
            with pytest.raises(FedGPTError):
                command(place / "server", path, place / "new")
    assert (place / "server/sites.json").read_bytes() == before
    assert not (place / "new/b.approval").exists()


@many
@given(damages())
def test_an_approval(place, damage):
    kit = place / NEW_KIT
    unapproved = kit.read_bytes()
    good = read_kit(kit)
    kit.write_bytes(unapproved)
    with damaged(place / APPROVAL, damage):
        found = outcome(lambda: read_kit(kit), secrets_of(kit))
        if found is None:
            assert kit.read_bytes() == unapproved
        else:
            assert found.approval == good.approval and found.name == "b"
    kit.write_bytes(unapproved)


@many
@given(damages())
@example(lambda good: good.replace(b'"c": {', b'"a": {'))
@example(lambda good: good.replace(b'"c": {', b'"A": {'))
@example(lambda good: good.replace(b'"revoked": "', b'"revokec": "'))
@example(lambda good: json.dumps(json.loads(good) | {"sites": {"e": {}}}).encode())
def test_the_list_of_sites(place, damage):
    """A bit of a name or of a time may be another valid one: no key comes in, or back, by that."""
    server = place / "server"
    good, every = sites(server), all_sites(server)
    with damaged(server / "sites.json", damage) as bad:
        found = outcome(lambda: sites(server), [])
        if found is None:
            with pytest.raises(FedGPTError):
                revoke(server, "a")
            assert cli.dispatch("keys", ["list", str(server)]) == 1
            assert (server / "sites.json").read_bytes() == bad
            return
        assert set(found.values()) <= set(good.values())
        revoked = {site.public_key.encode() for site in every.values() if site.revoked}
        assert not revoked & set(found.values())


@pytest.mark.parametrize(
    "name, record",
    [
        ("e", lambda sites: sites["a"]),
        ("e", lambda sites: sites["c"]),  # of a site that is revoked
        ("e", lambda sites: sites["a"] | {"revoked": "2026-01-01T00:00:00+00:00"}),
        ("e", lambda sites: NEW | {"replaced": sites["d"]["replaced"]}),
        ("A", lambda sites: NEW),
        ("e", lambda sites: NEW | {"replaced": ["SHA256:x"]}),
        ("e", lambda sites: NEW | {"public_key": P_256}),
        ("e", lambda sites: NEW | {"approved": "today"}),
        ("e", lambda sites: NEW | {"approved": "2026-01-01"}),  # without its time zone
        ("e", lambda sites: NEW | {"revoked": ""}),
        ("e f", lambda sites: NEW),
    ],
)
def test_two_sites_with_one_key_and_records_of_no_meaning(place, name, record):
    server = place / "server"
    sites_of = json.loads((server / "sites.json").read_bytes())["sites"]

    def add(site: Any) -> Damage:
        return lambda good: json.dumps({"format": 1, "sites": {**sites_of, name: site}}).encode()

    bad = add(record(sites_of))
    with (
        damaged(server / "sites.json", bad),
        pytest.raises(FedGPTError, match=r"sites\.json"),
    ):
        sites(server)
    name = "e"
    with damaged(server / "sites.json", add(NEW)):
        assert name in sites(server), "without that it is read"


@pytest.mark.parametrize(
    "name, field", [(KIT, b'"approval"'), ("server/sites.json", b'"a"'), (REQUEST, b'"name"')]
)
def test_a_name_that_stands_twice(place, name, field):
    """Of two values the reader would take one, and somebody who looks at the file the other."""
    read = {KIT: read_kit, REQUEST: read_request}.get(name, lambda path: sites(path.parent))
    with (
        damaged(place / name, lambda good: good.replace(field, field + b": {}, " + field, 1)),
        pytest.raises(FedGPTError, match=r"the name .* stands twice in it"),
    ):
        read(place / name)


@many
@given(damages())
@example(lambda good: good.replace(b"9443", b"94430"))
@example(lambda good: good.replace(b"9443", b"9443.0"))
@example(lambda good: good.replace(b"fed.example.org", b"fed_example.org"))
def test_server_json(place, damage):
    """The operator may write it: it is read if every host is in the certificate."""
    server = place / "server"
    with damaged(server / "server.json", damage):
        found = outcome(lambda: read_server(server), [])
    if found is not None:
        assert set(found.hosts) <= {*HOSTS, "localhost", "127.0.0.1"} and found.hosts
        assert type(found.port) is int and 1 <= found.port <= 65535


@many
@given(st.sampled_from(["ca.key", "ca.pem", "server.key", "server.pem"]), damages())
def test_keys_and_certificates(place, name, damage):
    server = place / "server"
    good, key = read_server(server), ca_of(server)[1].private_numbers()
    secrets = secrets_of(server / "ca.key", server / "server.key")
    with damaged(server / name, damage):
        found = outcome(lambda: (read_server(server), ca_of(server)), secrets)
    if found is not None:
        assert found[0] == good and found[1][1].private_numbers() == key


@pytest.mark.parametrize("name", [KIT, *(f"server/{one}" for one in folder.FILES)])
def test_a_file_that_is_cut_or_has_a_byte_that_is_no_text(place, name):
    path = place / name
    good = path.read_bytes()

    def read() -> None:
        read_kit(place / KIT)
        read_server(place / "server")
        sites(place / "server")
        ca_of(place / "server")

    end = len(good.rstrip()) - 1  # the last line end may be missing
    for at in range(0, end, end // 40):
        for bad in (good[:at], good[:at] + b"\x80" + good[at + 1 :]):
            with damaged(path, lambda _, bad=bad: bad), pytest.raises(FedGPTError):
                read()
    read()
