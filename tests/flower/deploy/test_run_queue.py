"""The files of a server's runs, and what is told of them."""

from __future__ import annotations

import json
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.deployment import deployment
from support.disk import largest_file
from support.here import SMALL
from support.metrics_text import parsed

from fedgpt.config.compose import from_yaml, load, to_yaml
from fedgpt.core.errors import FedGPTError
from fedgpt.flower.deploy import audit, queue
from fedgpt.flower.deploy.monitor import text_of
from fedgpt.flower.deploy.queue import QueuedRun, Wish
from fedgpt.flower.deploy.status import Status, progress_of, status_of
from fedgpt.flower.deploy.supervise import Supervisor


@pytest.fixture
def wish(tmp_path) -> Wish:
    return Wish(load([*SMALL, f"run_dir={tmp_path / 'run'}"]), dated=False, resumed=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    return deployment(tmp_path, "north", "south").folder


def test_runs_are_numbered_in_their_order_also_if_many_are_submitted_at_once(folder, wish):
    threads = [threading.Thread(target=queue.add, args=(folder, wish)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runs = queue.runs(folder)
    assert [run.number for run in runs] == list(range(1, 13))
    assert all(run.waits for run in runs)
    assert to_yaml(from_yaml(runs[4].config)) == to_yaml(wish.options)
    files = list((folder / "queue").iterdir())
    assert len(files) == 12 and {stat.S_IMODE(one.stat().st_mode) for one in files} == {0o600}


def test_a_changed_run_is_read_again(folder, wish):
    run = queue.add(folder, wish, once=True)
    assert run.running and not run.waits, "no other server takes it"
    run.starts, run.reason, run.exit_code, run.ended = 2, "why", 3, queue.now()
    queue.write(folder, run)
    assert queue.read(folder, 1) == run


@pytest.mark.parametrize("damage", ["{", "[]", '{"number": 1}', "no"])
def test_a_damaged_file_is_named_and_does_not_stop_the_others(folder, wish, damage, caplog):
    for _ in range(2):
        queue.add(folder, wish)
    (folder / "queue" / "1.json").write_text(damage)
    with pytest.raises(FedGPTError, match=r"1\.json is damaged"):
        queue.read(folder, 1)
    assert [run.number for run in queue.runs(folder)] == [2]
    assert "1.json is damaged" in caplog.text
    assert queue.add(folder, wish).number == 3


def test_a_value_of_the_wrong_type_is_damage(folder, wish):
    queue.add(folder, wish)
    path = folder / "queue" / "1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"starts": "two"}))
    with pytest.raises(FedGPTError, match="starts is text"):
        queue.read(folder, 1)


def test_a_full_disk_is_told_and_leaves_no_run(folder, wish):
    with largest_file(20), pytest.raises(FedGPTError, match="queue cannot be written: File too"):
        queue.add(folder, wish)
    assert queue.runs(folder) == [] and list((folder / "queue").iterdir()) == []


def test_an_audit_line_is_appended_and_a_full_disk_is_a_warning(folder, caplog):
    audit.note(folder, "start", run=1, name="a")
    audit.note(folder, "end", run=1, exit_code=1, reason="x" * 5000)
    size = (folder / "audit.jsonl").stat().st_size
    with largest_file(size):
        audit.note(folder, "start", run=2)
    assert "cannot be written" in caplog.text
    first, second = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    assert first == {"time": first["time"], "act": "start", "run": 1, "name": "a"}
    assert len(second["reason"]) == audit.LONGEST
    assert stat.S_IMODE((folder / "audit.jsonl").stat().st_mode) == 0o600


# scores and epsilon are in the lines of scored versions only
LINES = [
    {"version": 0, "tokens": 0, "accepted": 0, "rejected": {}, "loss": 5.5, "epsilon": 0.5},
    {
        "version": 1,
        "tokens": 8,
        "accepted": 2,
        "rejected": {'a"b\\': 1},
        "loss": 5.25,
        "epsilon": 2,
    },
    {"version": 2, "tokens": 16, "accepted": 1, "rejected": {'a"b\\': 1, "stale": 3}},
]


def begun(folder: Path, wish: Wish) -> QueuedRun:
    """A run that has begun, with three versions."""
    run = queue.add(folder, wish, once=True)
    Path(run.run_dir).mkdir(exist_ok=True)
    sizes = {"bytes_up": 300, "bytes_down": 400, "quarantined": 0}
    lines = "".join(json.dumps(line | sizes) + "\n" for line in LINES)
    (Path(run.run_dir) / "metrics.jsonl").write_text(lines)
    return run


def test_progress_is_that_of_the_runs_folder(folder, wish):
    progress = progress_of(begun(folder, wish))
    assert (progress.version, progress.tokens, progress.accepted) == (2, 16, 3)
    assert progress.rejected == {'a"b\\': 2, "stale": 3}
    assert progress.scores == {"loss": 5.25}, "of the newest version that has a score"
    assert progress.epsilon == 2
    assert progress_of(queue.add(folder, replace(wish, dated=True))).version is None


def test_metrics_are_in_the_text_format_of_prometheus(folder, wish):
    run = begun(folder, wish)
    waiting = queue.add(folder, wish)
    sites = ("north", "south")
    metrics = parsed(text_of(Status(True, True, sites, ("south",), (run, waiting))))
    own = (("run", "1"),)
    assert metrics["fedgpt_clients_online"] == {(): 1}
    assert metrics["fedgpt_queue_length"] == {(): 1} and metrics["fedgpt_run_active"] == {(): 1}
    assert metrics["fedgpt_version"] == {own: 2} and metrics["fedgpt_loss"] == {own: 5.25}
    assert metrics["fedgpt_updates_accepted_total"] == {own: 3}
    assert metrics["fedgpt_updates_rejected_total"] == {
        (("run", "1"), ("reason", r"a\"b\\")): 2,
        (("run", "1"), ("reason", "stale")): 3,
    }
    assert metrics["fedgpt_received_bytes_total"] == {own: 300}
    idle = parsed(text_of(Status(True, False, (), (), ())))
    assert idle["fedgpt_link_up"] == {(): 0} and "fedgpt_version" not in idle


def test_metrics_of_a_run_with_client_privacy_are_those_that_may_be_published(folder, wish):
    run = replace(begun(folder, wish), published_only=True)
    metrics = parsed(text_of(Status(True, True, (), (), (run,))))
    assert {"fedgpt_version", "fedgpt_loss", "fedgpt_tokens_total"} <= metrics.keys()
    assert not {name for name in metrics if "updates" in name or "bytes" in name}


def test_a_folder_without_a_server_has_a_status(folder, wish):
    run = begun(folder, wish)
    status = status_of(folder)
    assert not status.serves and not status.link and status.online == ()
    assert status.approved == ("north", "south") and status.running == run
    told = status.as_json()
    assert told["offline"] == ["north", "south"] and told["running"]["progress"]["version"] == 2
    assert "config" not in told["running"]


def test_a_run_that_ends_at_the_moment_at_which_it_is_cancelled_has_ended_as_it_did(folder, wish):
    run = begun(folder, wish)
    read_by_cancel = queue.read(folder, run.number)
    queue.end(folder, run, "", 0)
    queue.cancel(folder, read_by_cancel)
    Supervisor(folder, None).end_cancelled()  # type: ignore[arg-type]  # it needs no link
    assert queue.read(folder, run.number).exit_code == 0 and not queue.cancelled(folder)
