"""The finished model on its way to the sites."""

from __future__ import annotations

import hashlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from support.superlink import in_thread, next_message, send

from fedgpt.client.site import Site
from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import CorpusOptions
from fedgpt.flower import finished
from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.finished import deliver, keep
from fedgpt.flower.grid_transport import STOP_FILE
from fedgpt.flower.pool.shared_memory import array_record


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "config.json").write_text("{}\n")
    (folder / "notes.txt").write_text("of the operator")
    return folder


# of the folders of models: of two servers, and of one that is not known
ENDS = [f"-{hashlib.sha256(f'SHA256:{name}'.encode()).hexdigest()[:16]}" for name in "ab"] + [""]


def site(folder: Path) -> Site:
    corpus = CorpusOptions(name="files", client="file", path=str(folder))
    return Site("ann", corpus, str(folder / "state"), str(folder / "cache"))


def message_with(arrays: dict[str, np.ndarray], run: str = "abc") -> Message:
    # without these there is no message
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    content = RecordDict({"files": array_record(arrays), "run": ConfigRecord({"id": run})})
    return Message(content, 1, "query.finished")


def takes(connection: FleetConnection, folder: Path) -> None:
    """Take the model as the client of a site does."""
    message = next_message(connection)
    send(connection, Message(keep(message, site(folder), "night"), reply_to=message))


def test_each_connected_client_gets_the_files_of_a_model(link, model, tmp_path):
    nodes, connections = {}, {}
    for name in ("ann", "bob"):
        nodes[name], connections[name] = link.node()

    def fail() -> None:
        message = next_message(connections["bob"])
        send(connections["bob"], Message(finished_error(), reply_to=message))

    threads = [in_thread(lambda: takes(connections["ann"], tmp_path)), in_thread(fail)]
    assert deliver(link.grid(), nodes | {"eve": 7}, model, "abc") == ["ann"]
    for thread in threads:
        thread.join(timeout=20)
    kept = tmp_path / "state" / "models" / "night-abc"
    assert sorted(path.name for path in kept.iterdir()) == ["config.json", "model.safetensors"]
    for path in kept.iterdir():
        assert path.read_bytes() == (model / path.name).read_bytes()


def finished_error() -> Error:
    return Error(1, "DiskFull()")


def test_a_client_that_hangs_does_not_hold_up_the_next_run_for_long(
    link, model, tmp_path, monkeypatch, caplog
):
    """It is connected, and the others have the model at once."""
    monkeypatch.setattr(finished, "LEAST_SECONDS", 1.5)
    nodes, connections = {}, {}
    for name in ("ann", "bob"):
        nodes[name], connections[name] = link.node()

    thread = in_thread(lambda: takes(connections["ann"], tmp_path))
    began = time.monotonic()
    assert deliver(link.grid(), nodes, model, "abc") == ["ann"]
    assert 1.5 <= time.monotonic() - began < 20
    thread.join(timeout=20)
    assert "waiting for 1 client to take the finished model, 2 s at most" in caplog.text


def test_a_large_model_is_waited_for_longer(model):
    assert finished.patience(0) == finished.patience(6_000_000) == 60
    assert finished.patience(30_000_000) == 300, "at 100 kB in a second"
    assert finished.patience(10**12) == 600


def test_a_server_that_is_stopped_waits_for_no_client_any_more(link, model, tmp_path, monkeypatch):
    """The run is complete by then."""
    stop = tmp_path / "stop"
    monkeypatch.setenv(STOP_FILE, str(stop))
    node, connection = link.node()
    have: list[str] = ["unknown"]
    grid = link.grid()

    def work() -> None:
        have[:] = deliver(grid, {"ann": node}, model, "abc")

    delivering = in_thread(work)
    next_message(connection)  # there is no answer to it
    assert delivering.is_alive()
    stop.touch()
    delivering.join(timeout=30)
    assert not delivering.is_alive() and have == []


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil", "pytorch_model.bin", "", "a/b"])
def test_a_site_writes_no_file_that_no_model_has(tmp_path, name):
    message = message_with({name: np.zeros(3, np.uint8), "config.json": np.zeros(3, np.uint8)})
    with pytest.raises(FedGPTError, match="which no model has"):
        keep(message, site(tmp_path), "night")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("run", ["../../up", "/etc", "x" * 5000])
def test_the_folder_of_a_model_is_below_that_of_the_site(tmp_path, run):
    keep(message_with({"config.json": np.zeros(3, np.uint8)}, run), site(tmp_path), "../night")
    (folder,) = (tmp_path / "state" / "models").iterdir()
    assert (folder / "config.json").read_bytes() == bytes(3)


def test_a_model_that_comes_twice_is_there_once(tmp_path):
    for byte in (1, 2):
        keep(message_with({"config.json": np.full(2, byte, np.uint8)}), site(tmp_path), "night")
    (folder,) = (tmp_path / "state" / "models").iterdir()
    assert (folder / "config.json").read_bytes() == bytes([2, 2])


def test_a_server_does_not_replace_the_model_of_another_server_by_taking_its_runs_id(tmp_path):
    for byte, server in ((1, "SHA256:a"), (2, "SHA256:b"), (3, "SHA256:b"), (4, "")):
        message = message_with({"config.json": np.full(2, byte, np.uint8)})
        keep(message, replace(site(tmp_path), server=server), "night")
    kept = [(tmp_path / "state" / "models" / f"night-abc{end}") for end in ENDS]
    assert [(folder / "config.json").read_bytes()[0] for folder in kept] == [1, 3, 4]
    assert len(list((tmp_path / "state" / "models").iterdir())) == 3


def test_clients_of_several_sites_with_one_state_keep_a_model_at_the_same_time(tmp_path):
    sites = [replace(site(tmp_path), name=name, server="SHA256:a") for name in ("ann", "bob", "c")]
    message = message_with({"config.json": np.full(2, 7, np.uint8)})
    with ThreadPoolExecutor(len(sites)) as executor:
        for _ in range(40):
            list(executor.map(lambda one: keep(message, one, "night"), sites))
    (folder,) = (tmp_path / "state" / "models").iterdir()
    assert (folder / "config.json").read_bytes() == bytes([7, 7])


def test_a_model_that_is_replaced_is_complete_at_every_moment_or_not_there(tmp_path, monkeypatch):
    """Also where the client is killed while it deletes the one from before."""

    def files(byte: int) -> Message:
        names = ("config.json", "tokenizer.json")
        return message_with({name: np.full(2, byte, np.uint8) for name in names})

    def killed(path, *rest, **options) -> None:
        next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
        raise SystemExit

    keep(files(1), site(tmp_path), "night")
    (folder,) = (tmp_path / "state" / "models").iterdir()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "rmtree", killed)
        keep(files(2), site(tmp_path), "night")
    found = [path.read_bytes() for path in folder.iterdir()]
    assert found == [bytes([2, 2])] * 2


@pytest.mark.parametrize("missing", ["files", "run"])
def test_a_message_with_other_records_is_refused(tmp_path, missing):
    message = message_with({"config.json": np.zeros(1, np.uint8)})
    message.content[missing] = ConfigRecord({}) if missing == "files" else array_record({})
    with pytest.raises(FedGPTError, match="has other records"):
        keep(message, site(tmp_path), "night")
