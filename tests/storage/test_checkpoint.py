"""Checkpoints: what they keep, damaged ones, restarts, and the format of an earlier version."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.advice import advises

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import sha256_of
from fedgpt.core.messages import ServerState
from fedgpt.core.options import RunOptions
from fedgpt.server.in_flight import restored_jobs
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.resume import open_or_resume
from fedgpt.storage.run_folder import JsonLines, RunFolder
from fedgpt.storage.tables import Clients, RunIdentity, RunTotals, VersionLine


def snapshot(version: int) -> Snapshot:
    rng = np.random.default_rng(version)
    memory = {"m": rng.standard_normal(50).astype(np.float32), "count": np.array(version)}
    return Snapshot(
        ServerState(rng.standard_normal(50).astype(np.float32), version, memory),
        RunIdentity("run", options={"rounds": 9}),
        VersionLine({"version": version, "rejected": {}}, sample=False),
        RunTotals(10 * version, rejected={"late": 2}, norms=(0.5, 1.5)),
        Clients({"next_number": {"a": version}, "accepted": {"a": version - 1}}, [{"a": 0}]),
        ({"client": "a", "number": version, "version": version, "sent": 0.5, "plan": {}},),
        ("noise",),
        {"base/0": rng.standard_normal(50).astype(np.float32)},
    )


def save(folder, *versions: int, keep: int = 3) -> None:
    checkpoints = Checkpoints(folder, keep)
    for version in versions:
        checkpoints.save(snapshot(version))
    checkpoints.close()


def assert_same(a: Snapshot, b: Snapshot) -> None:
    for name in ("identity", "line", "totals", "in_flight", "unsaved"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.clients.as_json() == b.clients.as_json() and a.state.version == b.state.version
    np.testing.assert_array_equal(a.state.params, b.state.params)
    for one, other in ((a.state.memory, b.state.memory), (a.extra, b.extra)):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name])
            assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)


def test_checkpoints_load_as_they_were_saved_and_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert_same(Checkpoints(tmp_path, 2).load(), snapshot(4))
    assert len(list(tmp_path.iterdir())) == 4  # two checkpoints, two digests, no temporary file


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    """A power cut between any two of these steps leaves a complete checkpoint."""
    save(tmp_path, 1, keep=1)
    steps: list[tuple[str, str]] = []
    sync, rename, unlink = os.fsync, Path.replace, Path.unlink

    def note(what: str, path: Path) -> None:
        if path.exists():
            name = "folder" if path.is_dir() else path.name.removeprefix(".version-0000000")
            steps.append((what, name.removeprefix("version-0000000")[: len("2.sha256")]))

    def noted_sync(descriptor: int) -> None:
        sync(descriptor)
        note("sync", Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", lambda path, to: (note("rename", path), rename(path, to)))
    monkeypatch.setattr(
        Path, "unlink", lambda path, missing_ok=False: (note("delete", path), unlink(path, True))
    )
    save(tmp_path, 2, keep=1)
    assert steps == [
        *[("sync", "2.safete"), ("rename", "2.safete"), ("sync", "folder")],
        *[("sync", "2.sha256"), ("rename", "2.sha256"), ("sync", "folder")],
        *[("delete", "1.sha256"), ("delete", "1.safete")],
    ]


def test_damaged_checkpoints_are_skipped_with_a_warning(tmp_path, caplog):
    save(tmp_path, 1, 2, 3, 4, 5, keep=5)
    paths = sorted(tmp_path.glob("*.safetensors"))
    flipped = bytearray(paths[4].read_bytes())
    flipped[-7] ^= 1  # within the weights: only the digest shows it
    paths[4].write_bytes(flipped)
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    paths[2].with_suffix(".sha256").unlink()  # killed between the rename and the commit mark
    with caplog.at_level(logging.WARNING):
        assert_same(Checkpoints(tmp_path, 5).load(), snapshot(2))
    assert caplog.text.count("is damaged") == 3


def test_a_run_whose_checkpoints_are_all_damaged_starts_again_in_another_folder(tmp_path):
    save(tmp_path / "a", 1)
    (tmp_path / "a" / "version-00000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(FedGPTError, match="no checkpoint in") as refused:
        Checkpoints(tmp_path / "a", 1).recover()
    advises(refused.value, "; start again with another run_dir")
    assert Checkpoints(tmp_path / "b", 1).recover() is None, "so it begins at version 0"


def test_loading_from_an_empty_folder_gives_none(tmp_path):
    assert Checkpoints(tmp_path, 1).load() is None


def test_equal_states_are_equal_files(tmp_path):
    save(tmp_path / "a", 3)
    save(tmp_path / "b", 3)
    assert (tmp_path / "a/version-00000003.safetensors").read_bytes() == (
        tmp_path / "b/version-00000003.safetensors"
    ).read_bytes()


def test_a_checkpoint_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file", 1)
    checkpoints.save(snapshot(1))
    with pytest.raises(FedGPTError, match="could not read or write a checkpoint"):
        checkpoints.wait()


def test_a_checkpoint_that_was_not_written_is_an_error_of_the_next_one(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file", 1)
    checkpoints.save(snapshot(1))
    with pytest.raises(FedGPTError, match="could not read or write a checkpoint"):
        checkpoints.save(snapshot(2))


def test_a_second_process_is_refused_and_the_lock_ends_with_the_first(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(FedGPTError, match="another fedgpt process") as refused:
        RunFolder(tmp_path)
    advises(refused.value, "wait for it or name another run_dir")
    RunFolder(tmp_path / "another").close()
    folder.close()
    RunFolder(tmp_path).close()


def test_a_line_that_a_crash_cut_off_is_skipped(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.append({"version": 0})
    folder.metrics.append({"version": 1})
    path = tmp_path / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 2, "a process that is killed loses no line"
    folder.close()
    path.write_text(path.read_text()[:-5])
    assert RunFolder(tmp_path).metrics.read() == [{"version": 0}]
    assert json.loads(path.read_text().splitlines()[0]) == {"version": 0}


@pytest.mark.parametrize("line", ['{"vers', '{"loss": 2.0}', "[1]"], ids=["cut", "no key", "list"])
def test_records_from_a_damaged_line_on_are_not_read(tmp_path, caplog, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"version": 0}}\n{line}\n{{"version": 2}}\n')
    assert RunFolder(tmp_path).metrics.read() == [{"version": 0}]
    assert "line 2 is damaged; it and all later ones are ignored" in caplog.text


def test_after_three_starts_without_a_new_version_the_previous_checkpoint_is_used(tmp_path, caplog):
    save(tmp_path, 1, 2)
    for _ in range(3):
        checkpoints = Checkpoints(tmp_path, 2)
        assert checkpoints.recover().state.version == 2
        checkpoints.started(2)
        checkpoints.save(snapshot(2))  # as each start of a server does
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, 2)
    assert checkpoints.load().state.version == 1, "also for a reader"
    assert checkpoints.recover().state.version == 1 and checkpoints.retired == 2
    assert "3 starts from version-00000002.safetensors made no new version" in caplog.text
    assert (tmp_path / "version-00000002.damaged").exists()


@pytest.mark.parametrize("how", ["a new checkpoint", "a regular end"])
def test_a_new_checkpoint_or_a_regular_end_resets_the_count_of_starts(tmp_path, how):
    save(tmp_path, 1, 2)
    for version in range(3, 8):
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.started(checkpoints.recover().state.version)
        if how == "a new checkpoint":
            checkpoints.save(snapshot(version))
        else:
            checkpoints.ended()
        checkpoints.close()
    assert Checkpoints(tmp_path, 2).recover().state.version == (
        7 if how == "a new checkpoint" else 2
    )


def test_the_only_checkpoint_is_used_after_any_number_of_starts(tmp_path, caplog):
    save(tmp_path, 1)
    for _ in range(5):
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.started(checkpoints.recover().state.version)
        checkpoints.close()
    assert Checkpoints(tmp_path, 2).recover().state.version == 1
    assert not caplog.text, "there is no previous one to try"


def test_the_only_undamaged_checkpoint_is_used_after_any_number_of_starts(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "version-00000001.safetensors").write_bytes(b"torn")
    for _ in range(5):
        checkpoints = Checkpoints(tmp_path, 2)
        checkpoints.started(checkpoints.recover().state.version)
        checkpoints.close()
    assert Checkpoints(tmp_path, 2).recover().state.version == 2


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_reader_changes_no_file(tmp_path):
    """To a reader, a checkpoint between its rename and its mark looks damaged."""
    save(tmp_path, 1, 2, 3)
    (tmp_path / "version-00000003.sha256").unlink()
    (tmp_path / ".version-00000004.safetensors.abcd").write_bytes(b"half")
    before = contents(tmp_path)
    assert Checkpoints(tmp_path, 3).load().state.version == 2
    assert contents(tmp_path) == before


def test_a_run_renames_damaged_checkpoints_and_removes_temporary_files(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "version-00000003.safetensors").write_bytes(b"torn")
    (tmp_path / ".version-00000004.safetensors.abcd").write_bytes(b"half")
    assert Checkpoints(tmp_path, 3).recover().state.version == 2
    names = {path.name for path in tmp_path.iterdir()}
    intact = {f"version-0000000{v}.{end}" for v in (1, 2) for end in ("safetensors", "sha256")}
    assert names == intact | {"version-00000003.damaged"}


def test_a_refused_resume_changes_no_file(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "version-00000003.safetensors").write_bytes(b"torn")
    (tmp_path / ".version-00000004.safetensors.abcd").write_bytes(b"half")
    before = contents(tmp_path)

    def refuse(found: Snapshot) -> None:
        assert found.state.version == 2
        raise FedGPTError("other options")

    with pytest.raises(FedGPTError, match="other options"):
        Checkpoints(tmp_path, 3).recover(refuse)
    assert contents(tmp_path) == before


def test_a_run_whose_strategy_has_state_outside_its_checkpoint_is_refused(tmp_path):
    save(tmp_path / "checkpoints", 1, 2)
    before = contents(tmp_path / "checkpoints")
    refusal = r"its strategy has state \(noise\) that no checkpoint can contain; start again with"
    with RunFolder(tmp_path) as folder, pytest.raises(FedGPTError, match=refusal):
        open_or_resume(folder, RunOptions(run_dir=str(tmp_path)), lambda: snapshot(0))
    assert contents(tmp_path / "checkpoints") == before


def test_what_cannot_be_synced_is_left_as_it_was(tmp_path, monkeypatch):
    """So a power cut leaves the old file or the new one."""
    save(tmp_path, 1)
    checkpoints, params = Checkpoints(tmp_path, 2), np.arange(50, dtype=np.float32)
    records = JsonLines(tmp_path / "metrics.jsonl")
    checkpoints.save_best(params, 1, 2.0, "mine")
    checkpoints.started(1)
    records.append({"version": 0})
    before = contents(tmp_path)

    def failing(descriptor: int) -> None:
        raise OSError("no disk")

    def save_next() -> None:
        checkpoints.save(snapshot(2))
        checkpoints.wait()

    monkeypatch.setattr(os, "fsync", failing)
    for write in (
        save_next,
        partial(checkpoints.save_best, params + 1, 2, 1.0, "mine"),
        partial(checkpoints.started, 1),
        partial(records.keep, []),
    ):
        with pytest.raises((OSError, FedGPTError), match="no disk"):
            write()
        assert contents(tmp_path) == before
    checkpoints.close()


def test_the_log_is_kept_from_the_oldest_checkpoint_on(tmp_path):
    oldest_kept: list[int] = []
    checkpoints = Checkpoints(tmp_path, 2, oldest_kept.append)
    for version in (3, 6, 9, 12):
        checkpoints.save(snapshot(version))
    checkpoints.close()
    assert oldest_kept == [3, 3, 6, 9]


def test_damaged_best_weights_are_not_loaded(tmp_path):
    checkpoints, params = Checkpoints(tmp_path, 2), np.arange(50, dtype=np.float32)
    checkpoints.save_best(params, 4, 2.5, "mine")
    kept, loss = checkpoints.load_best("mine")
    assert np.array_equal(kept, params) and loss == 2.5
    path = tmp_path / "best.safetensors"
    assert checkpoints.load_best("another run") is None
    assert checkpoints.load_best() is not None, "the run is not known"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1  # within the weights, so that the file can still be parsed
    path.write_bytes(content)
    assert checkpoints.load_best() is None
    path.unlink()
    assert checkpoints.load_best() is None


def test_a_checkpoint_of_the_previous_format_is_converted(tmp_path):
    """Format 3, as fedgpt 0.1 wrote it before tables and names changed."""
    plan = {
        "run": "abc",
        "steps": 4,
        "tokens_done": 0,
        "tokens_per_step": 1,
        "tokens_total": 9,
        "numbers": {},
        "state": 1,
        "keep": [1],
        "held": 1,
    }
    old = {
        "format": 3,
        "version": 2,
        "run": "abc",
        "tokens_done": 640,
        "bytes_up": 10,
        "bytes_down": 20,
        "wall_seconds": 1.5,
        "seconds": 1.5,
        "dispatched": 5,
        "next_task": {"a": 3, "b": 2},
        "accepted": {"a": 1, "b": 1},
        "held": {"a": 1},
        "restorable": [{"a": 0}],
        "rejected": {"unknown_task": 1, "late": 2},
        "norms": [0.5],
        "strikes": {"b": 1},
        "quarantine": {"c": 9},
        "speeds": {"a": 2.5},
        "trained": {"a": 512},
        "charged": {"a": 7.0},
        "last": {"a": 0},
        "busy": {"a": 0.5},
        "pacing": "buffer",
        "in_flight": [{"client": "a", "task": 2, "version": 2, "sent": 1.0, "plan": plan}],
        "record": {"version": 2, "loss": 3.0},
        "evaluation": {"score": True, "sample": False},
        "unsaved": [],
        "environment": {"torch": "2"},
        "options": {"rounds": 9},
        "privacy": {},
    }
    path = tmp_path / "version-00000002.safetensors"
    params = np.arange(4, dtype=np.float32)
    save_file({"params": params}, path, metadata={"fedgpt": json.dumps(old)})
    path.with_suffix(".sha256").write_text(sha256_of(path) + "\n")
    found = Checkpoints(tmp_path, 2).load()
    assert found.state.version == 2 and found.identity.run == "abc"
    assert found.totals.tokens_done == 640 and found.totals.pacing == "buffer"
    assert dict(found.totals.rejected) == {"unknown_job": 1, "late": 2}
    columns = {
        "next_number": {"a": 3, "b": 2},
        "accepted": {"a": 1, "b": 1},
        "cached_version": {"a": 1},
        "strikes": {"b": 1},
        "resting_until": {"c": 9},
        "speed": {"a": 2.5},
        "tokens": {"a": 512},
        "charged": {"a": 7.0},
        "released": {"a": 0},
        "seconds": {"a": 0.5},
        "joined": {},
    }
    assert found.clients.as_json() == {"columns": columns, "restorable": ({"a": 0},)}
    assert found.line.metrics["loss"] == 3.0 and found.line.score and not found.line.sample
    (job,) = restored_jobs(found.in_flight, found.extra, params)
    assert (job.client, job.number, job.plan.local_steps, job.plan.state_job) == ("a", 2, 4, 1)
    assert job.plan.cached_version == -1, "the deltas from the cached version may have been deleted"


def test_a_checkpoint_of_an_unknown_format_is_refused_with_its_number(tmp_path):
    path = tmp_path / "version-00000002.safetensors"
    about = {"fedgpt": json.dumps({"format": 99})}
    save_file({"params": np.zeros(4, np.float32)}, path, metadata=about)
    path.with_suffix(".sha256").write_text(sha256_of(path) + "\n")
    with pytest.raises(FedGPTError, match="its format is 99, this version reads 3 and 4"):
        Checkpoints(tmp_path, 2).load()
