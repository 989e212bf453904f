"""Flower's SuperLink in a server's folder: registration, its sockets, what is left of old runs."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.date import now
from support.link import Fleet, Site, call, server_folder, write_sites

from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy import inner, link_state
from fedgpt.flower.deploy.keys import sites as approved_sites
from fedgpt.flower.deploy.link import Sites
from fedgpt.flower.deploy.registration import register, stop_old_runs


@pytest.fixture(scope="module")
def fleet(tmp_path_factory) -> Fleet:
    return Fleet(tmp_path_factory.mktemp("server"))


def ids(fleet: Fleet) -> dict[bytes, int]:
    """The nodes that are registered."""
    found = fleet.state.get_node_info(statuses=["registered", "online", "offline"])
    return {node.public_key: node.node_id for node in found}


def test_a_site_keeps_its_node_and_a_revoked_one_is_unregistered_for_good(fleet, tmp_path, caplog):
    north, south = fleet.sites
    west, before = Site("west"), ids(fleet)
    server_folder(tmp_path, [north, south])
    sites = Sites(tmp_path, fleet.state)
    assert ids(fleet) == before and set(sites.keys) == {"north", "south"}
    write_sites(tmp_path, [south, west], revoked=[north])
    sites.reload()
    assert set(sites.keys) == {"south", "west"}
    after = ids(fleet)
    assert set(after) == {south.public, west.public}
    assert after[south.public] == before[south.public]
    (named,) = [node for node in fleet.state.get_node_info() if node.public_key == west.public]
    assert named.name == "west"
    # the same key again: refused, and said
    write_sites(tmp_path, [north, south, west])
    sites.reload()
    assert set(ids(fleet)) == set(after) and "must make a new one" in caplog.text
    # a new key under the old name
    renewed = Site("north")
    write_sites(tmp_path, [renewed, south, west])
    sites.reload()
    assert set(ids(fleet)) == {*after, renewed.public}
    fleet.approved = {site.name: site.public for site in fleet.sites}
    register(fleet.state, {"south": south.public})


def bad_lists(site: Site) -> dict[str, str]:
    entry = {
        "public_key": site.public.decode(),
        "approved": "2026-01-01T00:00:00+00:00",
        "revoked": None,
    }
    return {
        "no JSON": "{",
        "empty": "",
        "no mapping": "[]",
        "no sites": '{"format": 1}',
        "sites are a list": '{"format": 1, "sites": []}',
        "no key": json.dumps({"format": 1, "sites": {"a": {"revoked": None}}}),
        "no word of revocation": json.dumps({"format": 1, "sites": {"a": {"public_key": "x"}}}),
        "no public key": json.dumps({"format": 1, "sites": {"a": {**entry, "public_key": "x"}}}),
        "a number": json.dumps({"format": 1, "sites": {"a": {**entry, "public_key": 7}}}),
        "not ASCII": json.dumps({"format": 1, "sites": {"a": {**entry, "public_key": "\u00e9"}}}),
        "a site that is text": json.dumps({"format": 1, "sites": {"a": "b"}}),
    }


@pytest.mark.parametrize("case", bad_lists(Site("a")))
def test_a_damaged_list_is_an_error_that_names_it_and_a_running_link_keeps_its_sites(
    fleet, tmp_path, case, caplog
):
    site = fleet.sites[1]
    server_folder(tmp_path, [site])
    sites = Sites(tmp_path, fleet.state)
    (tmp_path / "sites.json").write_text(bad_lists(site)[case])
    with pytest.raises(FedGPTError, match=r"sites\.json"):
        approved_sites(tmp_path)
    sites.reload()
    assert set(sites.keys) == {"south"} and "stay as they were" in caplog.text


def test_a_key_is_taken_as_flower_writes_it(tmp_path):
    site = Site("a")
    server_folder(tmp_path, [site])
    text = (tmp_path / "sites.json").read_text().replace("KEY-----\\n", "KEY-----\\n\\n")
    (tmp_path / "sites.json").write_text(text)
    assert approved_sites(tmp_path) == {"a": site.public}


def test_runs_of_a_link_that_has_ended_are_stopped_and_those_that_wait_are_not(fleet):
    running = fleet.run_id
    fleet.activate(fleet.sites[1])
    waiting, _ = fleet._run(claim=False)
    job = fleet.job(fleet.sites[1], np.zeros(3, np.float32))
    stop_old_runs(fleet.state)
    status = fleet.state.get_run_status({running, waiting})
    assert (status[running].status, status[running].sub_status) == ("finished", "stopped")
    assert status[waiting].status == "pending"
    assert job.metadata.message_id not in fleet.state.get_message_ids_from_run_id(running)


def test_a_server_app_has_minutes_to_start_but_not_to_be_silent_afterwards(fleet, monkeypatch):
    """Flower takes its task away after 30 s, in which a busy machine has started no Python."""

    def later(seconds: float) -> None:
        moment = now() + timedelta(seconds=seconds)
        monkeypatch.setattr(sql_corestate, "now", lambda: moment)

    _, slow = fleet._run(claim=False)
    _, lost = fleet._run(claim=False)
    assert fleet.state.claim_task(slow) and fleet.state.claim_task(lost)
    later(link_state.START_SECONDS - 10)
    assert fleet.state.claim_task(slow) is None and fleet.state.activate_task(slow)
    later(link_state.START_SECONDS + 10)
    assert not fleet.state.activate_task(lost) and fleet.state.claim_task(lost)
    later(link_state.START_SECONDS + 60)
    fleet.state.acknowledge_task_heartbeat(slow)
    assert fleet.state.get_tasks(task_ids=[slow])[0].status.status == "finished"


def test_a_damaged_database_is_named(tmp_path):
    (tmp_path / "link.db").write_bytes(b"no database" * 1000)
    with pytest.raises(FedGPTError, match=r"link\.db cannot be used"):
        inner.flower_app(tmp_path, b"x")


def test_flower_s_former_servers_stay_closed(tmp_path, monkeypatch):
    for name in inner._OPENINGS:
        monkeypatch.setenv(name, "1")
    app = inner.flower_app(tmp_path, b"x")

    async def check() -> None:
        async with app.router.lifespan_context(app):
            lifespan = app.state.superlink_lifespan
            assert lifespan.grpc_servers == [] and lifespan.superexec_process is None

    asyncio.run(check())
    assert app.state.enable_supernode_auth and app.state.superexec_auth_secret == b"x"


@pytest.mark.parametrize(
    "path, raw, served",
    [
        ("/v1/runtime/acquire-task", None, True),
        ("/v1/runtime", None, False),
        ("/v1/control/list-runs", None, False),
        ("/health", None, False),
        ("/v1/runtime/x", b"/v1/runtime%2Fx", False),
        ("//v1/runtime/x", None, False),
    ],
)
def test_only_paths_with_a_beginning_are_served(path, raw, served):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    only = inner.Only(app, inner.RUNTIME)
    answer = asyncio.run(call(only, path, [], [], raw_path=raw or path.encode()))
    assert answer.status == (200 if served else 403)


def test_the_control_socket_is_for_its_user_and_takes_the_place_of_an_old_one(tmp_path):
    path = tmp_path / "control.sock"
    for _ in range(2):
        one = inner.control_socket(path)
        assert path.stat().st_mode & 0o777 == 0o600
        one.close()
    with pytest.raises(FedGPTError, match="too long for a socket"):
        inner.control_socket(tmp_path / ("a" * 100) / "control.sock")


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs /proc")
def test_the_owner_of_a_connection_is_found():
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        accepted, address = listening.accept()
        with accepted:
            assert inner.owner(address, accepted.getsockname()) == os.getuid()
            assert inner.owner(("127.0.0.1", 1), accepted.getsockname()) is None
            assert inner.owner(address, ("127.0.0.1", 1)) is None
