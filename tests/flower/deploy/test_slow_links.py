"""Real clients over links that are slow, lossy or cut: each costs its own client alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedgpt.storage.run_folder import read_lines

SIMULATION = Path(__file__).parents[3] / "simulations" / "deploy"
sys.path.insert(0, str(SIMULATION))
from deployment import SITES, Deployment, deployment, wait_until  # noqa: E402
from network import Line, Namespace, namespace, why_not  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.long]
AWAY, OTHERS = "west", ("north", "south")  # the site with a link of its own, and those without
LONG = 300.0  # seconds; only a bound, the machine may be busy
OPTIONS = [
    *("pace=buffer", "pace.clients=3", "rounds=100000", "name=links", "checkpoint.every=100"),
    *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.block_size=16"),
    *("local.steps=20", "local.batch_size=4", "evaluate.tokens=1024", "evaluate.samples=0"),
    *("evaluate=ends", "tokenizer.vocab_size=300", "runtime.threads=1"),
]


class Linked:
    """A deployment with a run, and the network of one site."""

    def __init__(self, one: Deployment, network: Namespace):
        self.one, self.network = one, network

    def accepted(self) -> list[tuple[str, int]]:
        """The accepted updates: client and number of the job."""
        runs = self.one.server / "runs"
        if not runs.exists() or not (self.one.run_folder() / "events.jsonl").exists():
            return []
        events = read_lines(self.one.run_folder() / "events.jsonl")
        return [(e["client"], e["number"]) for e in events if e["event"] == "accept"]

    def count(self, *clients: str) -> int:
        return sum(client in clients for client, _ in self.accepted())

    def goes_on(self, *clients: str) -> None:
        """Wait until each of the clients has one more accepted update."""
        for client in clients:
            before = self.count(client)
            wait_until(lambda c=client, n=before: self.count(c) > n, LONG, f"an update of {client}")

    def all_once(self) -> bool:
        found = self.accepted()
        return len(set(found)) == len(found)


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Iterator[Linked]:
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("links") / "deployment"
    with namespace() as network, deployment(folder, say=False) as one:
        one.inside[AWAY] = network.inside
        one.write_texts()
        one.make_keys(network.host)
        for site in SITES:
            one.start_client(site)
        one.start_server(*one.run_options(*OPTIONS))
        found = Linked(one, network)
        wait_until(lambda: all(map(found.count, SITES)), LONG, "an update of each site")
        yield found


def test_a_slow_uplink_holds_up_nobody_else(linked):
    """A reply of some 40 kB needs 8 s on it, in which the others go on."""
    linked.network.slow(Line(rate=40))
    linked.goes_on(AWAY)  # this one was partly on its way before
    before, others = linked.count(AWAY), linked.count(*OTHERS)
    wait_until(lambda: linked.count(AWAY) > before, LONG, "the slow update")
    assert linked.count(*OTHERS) > others + 2 and linked.all_once()
    linked.network.free()


def test_delay_and_loss_cost_no_update(linked):
    tool = linked.network.slow(Line(rate=10_000, delay=200, loss=5))
    try:
        if tool != "netem":
            pytest.skip(tool)
        linked.goes_on(AWAY, AWAY, *OTHERS)
        assert linked.all_once()
    finally:
        linked.network.free()


@pytest.mark.parametrize("seconds", [20, 80])
def test_a_link_that_is_cut_loses_nothing_and_its_client_comes_back(linked, seconds):
    """After 80 s the server has given the client up, and sends its job again."""
    seen, numbers = linked.accepted(), linked.count(AWAY)
    linked.network.cut()
    time.sleep(2)  # what was on its way has arrived, or not
    others = linked.count(*OTHERS)
    time.sleep(seconds - 2)
    assert linked.count(*OTHERS) > others + 2
    linked.network.join()
    wait_until(lambda: linked.count(AWAY) > numbers + 1, LONG, "two updates")
    assert linked.accepted()[: len(seen)] == seen and linked.all_once()
    events = list(read_lines(linked.one.run_folder() / "events.jsonl"))
    assert not [event for event in events if event["event"] in ("reject", "quarantine")]
    mine = sorted(number for client, number in linked.accepted() if client == AWAY)
    assert mine == list(range(len(mine))), "no job of it was given up"
