"""Complete runs in this process: their records, and errors such as a full disk."""

from __future__ import annotations

import errno
import math
import os
import weakref

import pytest
from support.here import run_here, tiny_run

from fedgpt import assemble
from fedgpt.assemble import RunText
from fedgpt.client import work
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError, StoppedEarly
from fedgpt.core.faults import Injected, injected
from fedgpt.core.messages import ClientInfo
from fedgpt.data.shards import load_shards
from fedgpt.flower.client_app import app
from fedgpt.flower.in_process_grid import InProcessGrid
from fedgpt.flower.serve import _Connection
from fedgpt.storage import checkpoint
from fedgpt.storage.journal import Journal
from fedgpt.storage.run_folder import JsonLines, read_lines
from fedgpt.update import wire


@pytest.fixture
def options(tmp_path) -> list[str]:
    return tiny_run(tmp_path)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_for(name: str):
    """`JsonLines.append` with a full disk for the file `name` only."""
    append = JsonLines.append
    return lambda lines, record: full() if lines.path.name == name else append(lines, record)


def test_too_little_public_text_for_the_servers_own_update_is_an_error_before_a_round(
    tmp_path, options
):
    few = ["corpus.public=1e-9", "tokenizer=bytes", "strategy=fltrust", "model.block_size=1000"]
    with pytest.raises(
        ConfigError,
        match=r"corpus.public=1e-09: \d+ tokens are public, .* model.block_size=1000; raise",
    ):
        run_here(*options, *few, "evaluate.tokens=64")
    assert not list((tmp_path / "run" / "clients").glob("*"))


def test_a_run_that_cannot_start_leaves_its_folder_free(tmp_path, options):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"init_from=.*: config.json is damaged: it has a list"):
        run_here(*options, f"init_from={weights}")
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert run_here(*options)["versions"] == 3


VIRTUAL = ["clock=virtual", "fleet=published"]


@pytest.mark.parametrize(
    "more, ttl", [([], None), (["pace.deadline=20"], 30), (["pace.deadline=20", *VIRTUAL], None)]
)
def test_the_worker_of_a_client_that_hangs_is_ended_soon_after_the_deadline(options, more, ttl):
    """On the real clock; a deadline on the virtual clock is not one of the worker."""
    o = compose.load([*options, *more])
    prepared, shards = load_shards(o)
    grid = InProcessGrid(app, len(shards), {}, "")
    text = RunText(prepared, [ClientInfo(shard.client, shard.size) for shard in shards])
    assert _Connection(o, grid).connect(text, 0.0).ttl == ttl


PLACES = {
    "events.jsonl": (JsonLines, "append", full_for("events.jsonl")),
    "metrics.jsonl": (JsonLines, "append", full_for("metrics.jsonl")),
    "starts.json": (checkpoint, "write_text", full),
}


@pytest.mark.parametrize("file", PLACES)
def test_a_full_disk_is_one_clear_error_for_every_file(tmp_path, options, monkeypatch, file):
    """With space on the disk the run continues to the weights of an uninterrupted run."""
    folder = tmp_path / "run"
    owner, name, broken = PLACES[file]
    with monkeypatch.context() as patched, pytest.raises(FedGPTError) as error:
        patched.setattr(owner, name, broken)
        run_here(*options)
    assert str(error.value) == (
        f"could not write a file in {folder}: [Errno {errno.ENOSPC}] No space left on device; "
        f"make room and continue with: fedgpt run resume={folder}"
    )
    assert not (folder / "checkpoints" / "starts.json").exists(), "it did not crash"
    summary = run_here(*options)
    assert [r["version"] for r in read_lines(folder / "metrics.jsonl")] == [0, 1, 2, 3]
    uninterrupted = run_here(*options[:-2], f"run_dir={tmp_path / 'uninterrupted'}", options[-1])
    assert uninterrupted["weights_sha256"] == summary["weights_sha256"]


@pytest.mark.parametrize(
    "update, error", [("none", 0), ("int8", 0.01), ("int4", 0.1), ("topk", 1.0)]
)
def test_the_compression_error_is_in_the_metrics(tmp_path, options, update, error):
    run_here(*options, f"update={update}")
    first, *later = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["compress_error"] is None and first["residual_norm"] is None
    for record in later:
        if update == "none":
            assert record["compress_error"] is None and record["residual_norm"] is None
        else:
            assert error / 100 < record["compress_error"] < error
            # proportional for one update, and almost so for the mean of two similar ones
            norm = record["residual_norm"] / record["compress_error"]
            assert math.isclose(norm, record["update_norm"], rel_tol=0.2) or update == "topk"


@pytest.mark.parametrize("unit", ["client", "local", "example"])
def test_no_metric_of_private_text_leaves_the_client(tmp_path, options, unit, monkeypatch):
    sent = []

    def noted(run, update, *more):
        sent.append(update)
        return wire.header_of(run, update, *more)

    monkeypatch.setattr(work, "header_of", noted)
    run_here(*options, "update=int8", f"privacy={unit}")
    assert sent and {name for update in sent for name in update.metrics} <= {
        "lr",
        "state_lost",
        "charged",
    }
    assert all(r["compress_error"] is None for r in read_lines(tmp_path / "run" / "metrics.jsonl"))


def test_only_the_class_of_a_clients_exception_reaches_the_server(tmp_path, options, monkeypatch):
    def failing(work, job, index):
        raise KeyError(f"the secret text of {job.client} in {tmp_path}")

    monkeypatch.setattr(work.ClientWork, "train", failing)
    with pytest.raises(StoppedEarly, match="client_error x2"):
        run_here(*options)
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "ClientFailed: KeyError" in events and "secret" not in events


def test_the_initial_model_is_freed_when_no_job_uses_it(tmp_path, options, monkeypatch):
    """After a resume the same holds for the base versions of all jobs that were in flight."""
    kept = []

    class Watched(assemble.Server):
        def __init__(self, *parts, **more):
            super().__init__(*parts, **more)
            self.began = weakref.ref(self.state.params)

        def _end(self, over):
            super()._end(over)
            kept.append(self.began() is not None)

    monkeypatch.setattr(assemble, "Server", Watched)
    run_here(*options)
    assert kept == [False]


def test_a_journal_whose_replay_crashes_is_discarded_with_its_checkpoint(
    tmp_path, options, monkeypatch, caplog
):
    """A replay of the journal would crash again, so the jobs are sent again and the run ends."""
    options = [
        *options,
        "pace=buffer",
        "pace.clients=2",
        "strategy=delta_sgd",
        "rounds=6",
        "checkpoint.every=1",
    ]
    for fault in ("aggregate:5", *["open:1"] * 3):
        with injected(f"{fault}:raise"), pytest.raises(Injected):
            run_here(*options)
    wal = tmp_path / "run" / "wal"
    assert (wal / "version-00000004.log").exists()
    read, found = Journal.read, []

    def noted(journal, version):
        found.append((version, sorted(path.name for path in wal.iterdir())))
        return read(journal, version)

    monkeypatch.setattr(Journal, "read", noted)
    assert run_here(*options)["versions"] == 6
    assert found == [(3, ["version-00000003.log", "version-00000004.damaged"])]
    assert "3 starts from version-00000004.safetensors made no new version" in caplog.text
