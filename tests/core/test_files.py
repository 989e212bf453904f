"""A reader sees the old or the new content of a file, never a part of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from fedgpt.core import files
from fedgpt.core.files import replacing, sha256_of, write_text


@pytest.fixture(params=[True, False], ids=["durable", "not durable"])
def durable(request) -> bool:
    return request.param


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The calls of fsync in order, each as `file` or `folder`."""
    seen: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}")
        seen.append("folder" if path.is_dir() else "file")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return seen


def test_the_block_writes_a_temporary_file_that_is_renamed_at_the_end(tmp_path, durable):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with replacing(path, durable) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_content_and_no_temporary(tmp_path, durable):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="write failed"), replacing(path, durable) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("write failed")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_leaves_the_old_content_and_no_temporary(tmp_path, durable, kind):
    with pytest.raises(kind), replacing(tmp_path / "never", durable) as temporary:
        temporary.write_bytes(b"half")
        raise kind
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_leaves_no_temporary(tmp_path, durable):
    path = tmp_path / "taken"
    (path / "child").mkdir(parents=True)
    with pytest.raises(OSError), replacing(path, durable) as temporary:
        temporary.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [path] and (path / "child").is_dir()


def test_missing_folders_are_made(tmp_path, durable):
    write_text(tmp_path / "a" / "b" / "c.txt", "text", durable)
    assert (tmp_path / "a/b/c.txt").read_text() == "text"


def test_a_durable_file_is_synced_before_and_its_folder_after_the_rename(
    tmp_path, synced, monkeypatch
):
    real = Path.replace
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (synced.append("rename"), real(self, to))[1]
    )
    write_text(tmp_path / "x", "text")
    assert synced == ["file", "rename", "folder"]


def test_a_file_that_is_not_durable_is_not_synced(tmp_path, synced):
    write_text(tmp_path / "x", "text", durable=False)
    assert synced == [] and (tmp_path / "x").read_text() == "text"


def test_text_is_utf8_whatever_the_locale(tmp_path, durable):
    write_text(tmp_path / "x", "天下 \u2028 é\n", durable)
    assert (tmp_path / "x").read_bytes() == "天下 \u2028 é\n".encode()


def test_two_writers_use_different_temporary_files(tmp_path):
    path = tmp_path / "x"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the outer block ends last and overwrites the inner one"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert (
        sha256_of(tmp_path / "x")
        == sha256_of(str(tmp_path / "x"))
        == hashlib.sha256(content).hexdigest()
    )
