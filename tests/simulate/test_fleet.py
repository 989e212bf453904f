"""fleet=trace and replay: a table of measured devices, the run with it, and wrong files."""

from __future__ import annotations

import numpy as np
import pytest
from support.fake_transport import honest
from support.harness import run_virtual

from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import FleetOptions, RunOptions
from fedgpt.simulate.fleet import PUBLISHED, Fleet, fleet_problems

JOB = Job("b", 0, 0, np.zeros(3, np.float32), Plan("run", 10, 0, 1, 100))


@pytest.fixture
def table(tmp_path):
    def write(text: str, encoding: str = "utf-8") -> str:
        path = tmp_path / "speeds.csv"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write


def problems(path: str, clock: str = "virtual", **more) -> list[str]:
    options = RunOptions(clock=clock, fleet=FleetOptions("trace", path=path, **more))
    return [problem.removeprefix(f"fleet.path={path}") for problem in fleet_problems(options)]


def test_a_table_of_the_published_speeds_is_the_published_fleet(tmp_path, table):
    rows = "".join(
        f"{client},{seconds}\n" for client, seconds in zip("dcba", reversed(PUBLISHED), strict=True)
    )
    clients = dict.fromkeys("abcd", honest)
    runs = [
        run_virtual(tmp_path / fleet.name, clients, DeltaSGD(), rounds=30, fleet=fleet)
        for fleet in (
            FleetOptions("published"),
            FleetOptions("trace", path=table("client,step_seconds\n" + rows)),
        )
    ]
    assert runs[0].summary["weights_sha256"] == runs[1].summary["weights_sha256"]
    assert runs[0].summary["virtual_seconds"] == runs[1].summary["virtual_seconds"]


def test_every_device_has_its_own_link(table):
    path = table("client,up,step_seconds,down\na,1,2,3\nb,40,0.5,20\n")
    fleet = Fleet(FleetOptions("trace", path=path), seed=0)
    fleet.meet(["a", "b"])
    trip = fleet.trip(JOB, bytes_down=2_000_000)
    assert trip.arrives == pytest.approx(2 * 20 + 10 * 0.5) and trip.per_byte == pytest.approx(
        40e-6
    )
    assert fleet.step_seconds("a") == 2


def test_links_that_a_table_leaves_out_are_those_of_the_options(table):
    fleet = Fleet(
        FleetOptions("trace", path=table("client,step_seconds\nb,1\n"), down=4.0, up=6.0), seed=0
    )
    fleet.meet(["b"])
    trip = fleet.trip(JOB, bytes_down=1_000_000)
    assert trip.arrives == pytest.approx(4 + 10) and trip.per_byte == pytest.approx(6e-6)


def test_a_byte_order_mark_and_other_columns_are_ignored(table):
    assert (
        problems(table("client,model,step_seconds\r\na,phone,1.5\r\n", encoding="utf-8-sig")) == []
    )


@pytest.mark.parametrize(
    "text, problem",
    [
        (
            "client;step_seconds\na;1\n",
            ": its first line lacks client, step_seconds; it has client;step_seconds;"
            " name the columns there",
        ),
        ("", ": its first line lacks client, step_seconds; it has nothing; name the columns there"),
        (
            "client,step_seconds\na,1\nb,fast\n",
            " line 3: step_seconds=fast: must be above 0, down and up at least 0",
        ),
        (
            "client,step_seconds\na,-1\n",
            " line 2: step_seconds=-1: must be above 0, down and up at least 0",
        ),
        (
            "client,step_seconds\na\n",
            " line 2: step_seconds=None: must be above 0, down and up at least 0",
        ),
        (
            "client,step_seconds,up\na,1,nan\n",
            " line 2: step_seconds=1, up=nan: must be above 0, down and up at least 0",
        ),
    ],
)
def test_a_wrong_table_is_refused_before_the_run(table, text, problem):
    assert problems(table(text)) == [problem]


def test_a_file_that_is_not_utf8_is_refused(table):
    assert problems(table("client,step_seconds\na,1\n", encoding="utf-16"))[0].startswith(
        ": is not UTF-8 text"
    )


def test_links_on_the_real_clock_are_refused(table):
    path = table("client,step_seconds,up\na,1,2\n")
    assert problems(path, clock="real") == [
        ": down and up are modelled by clock=virtual only; add clock=virtual, or leave them out"
    ]
    assert problems(table("client,step_seconds,up\na,1,0\n"), clock="real") == []


@pytest.mark.parametrize(
    "text, good",
    [('{"event": "open"}\n', True), ('{"a": 1}\n', False), ("5\n", False), ("", False)],
)
def test_only_the_events_of_a_run_are_replayed(table, text, good):
    path = table(text)
    options = RunOptions(clock="virtual", fleet=FleetOptions("replay", path=path))
    needs = "fleet=replay needs a run's events.jsonl, and this is none; name another"
    problem = f"fleet.path={path}: {needs}"
    assert list(fleet_problems(options)) == ([] if good else [problem])


def test_the_error_for_missing_lines_names_the_clients(table):
    fleet = Fleet(FleetOptions("trace", path=table("client,step_seconds\na,1\n")), seed=0)
    with pytest.raises(ConfigError, match=r"has no line for 4 of 5 clients: 'b', 'c', 'd', \.\.\."):
        fleet.meet(list("abcde"))
