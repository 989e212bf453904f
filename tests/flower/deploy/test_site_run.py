"""Runs whose clients have their own text, over a real SuperLink."""

from __future__ import annotations

import gzip
import json
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.sites import NAMES, Texts, start_site, write_text
from support.superlink import LiveSuperLink, live_superlink

from fedgpt.config.compose import load
from fedgpt.core.errors import StoppedEarly
from fedgpt.core.faults import Injected, injected
from fedgpt.flower import fetch
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve
from fedgpt.storage.run_folder import read_lines

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Texts:
    monkeypatch.setattr(fetch, "NODES_SECONDS", 0.1)
    return Texts.write(tmp_path)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    path = folder / "events.jsonl"
    return [e for e in read_lines(path) if e["event"] == kind] if path.exists() else []


def when(condition: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """A thread that waits for the condition, and then acts."""
    thread = threading.Thread(target=lambda: (until(condition), act()), daemon=True)
    thread.start()
    return thread


def start_all(nodes: ExitStack, link: LiveSuperLink, texts: Texts, **config: str) -> None:
    for name in NAMES:
        start_site(nodes, link, texts, name, **config)


def test_own_text_gives_the_weights_of_the_pool_on_the_same_shards(texts, tmp_path):
    """And nothing of a client's words is in the run's folder, or was sent."""
    words = texts.of("ann") / "secret.txt"
    words.write_text("zanzibar is where the quagga sleeps.\n" * 3)
    pool = texts.in_one_place(f"run_dir={tmp_path / 'pool'}")
    options = load(texts.at_sites(f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        objects, store = [], link.state.store_object
        link.state.store_object = lambda *told: (objects.append(told[-1]), store(*told))[1]
        start_all(nodes, link, texts)
        summary = serve(options, link.grid())
    assert summary["weights_sha256"] == pool["weights_sha256"]
    assert summary["final"] == pool["final"] and summary["rejected"] == {}
    for name in NAMES:  # who has trained it has it
        (kept,) = (tmp_path / "state" / name / "models").iterdir()
        assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "run" / "model").iterdir()
        }
    folders = [tmp_path / "run", tmp_path / "cache"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(objects) > 12 and len(files) > 12
    for content in [*objects, *(path.read_bytes() for path in files)]:
        for found in (content, *unpacked(content)):
            assert b"zanzibar" not in found and b"quagga" not in found


def unpacked(content: bytes) -> list[bytes]:
    """What is packed in some bytes, if they are packed."""
    found = []
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            found.append(unpack(content))
        except (OSError, zlib.error, EOFError):
            continue
    return found


def test_a_site_joins_while_the_run_goes_on_and_after_a_crash_the_log_says_so(texts, tmp_path):
    folder = tmp_path / "run"
    words = texts.at_sites("pace=buffer", "pace.clients=3", "rounds=40", f"run_dir={folder}")
    options = load([*words, "pace.begin=2", "checkpoint.every=100"])
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in ("ann", "bob"):
            start_site(nodes, link, texts, name)
        when(
            lambda: len(events(folder, "accept")) > 2,
            lambda: start_site(nodes, link, texts, "eve"),
        )
        with injected("accepted:30:raise"), pytest.raises(Injected):
            serve(options, link.grid())
        first = [(e["client"], e["number"]) for e in events(folder, "accept")]
        (joined,) = events(folder, "join")
        assert joined["client"] == "eve" and joined["version"] > 0
        assert ("eve", 0) in first
        # all of it is in the log since version 0, with eve as a newcomer
        summary = serve(options, link.grid())
    after = [(e["client"], e["number"]) for e in events(folder, "accept")]
    assert after[: len(first)] == first and len(set(after)) == len(after) >= 40
    assert events(folder, "join") == [joined] and summary["versions"] == 40


def test_a_continued_run_knows_the_site_that_joined(texts, tmp_path):
    """Its checkpoint is of after the join; ann is away when the run goes on."""
    folder = tmp_path / "run"
    words = texts.at_sites("pace=buffer", "pace.clients=3", "rounds=60", f"run_dir={folder}")
    options = load([*words, "pace.begin=1", "checkpoint.every=1"])
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        ann = start_site(nodes, link, texts, "ann")
        when(
            lambda: len(events(folder, "accept")) > 2,
            lambda: start_site(nodes, link, texts, "bob"),
        )
        with (
            injected("accepted:40:raise"),
            pytest.raises(Injected),
        ):
            serve(options, link.grid())
        assert [e["client"] for e in events(folder, "join")] == ["bob"]
        ann.terminate()
        ann.wait(timeout=60)
        summary = serve(options, link.grid())
    assert summary["versions"] == 60
    assert [e["client"] for e in events(folder, "join")] == ["bob"], "it joins once"
    assert {e["client"] for e in events(folder, "accept")} == {"ann", "bob"}


def test_with_privacy_of_clients_nobody_joins_later(texts, tmp_path, caplog):
    folder = tmp_path / "run"
    words = ["privacy=client", "privacy.noise_multiplier=1", "privacy.clip=1", "pace.clients=2"]
    options = load(texts.at_sites(*words, "rounds=12", "pace.begin=2", f"run_dir={folder}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in ("ann", "bob"):
            start_site(nodes, link, texts, name)
        when(
            lambda: len(events(folder, "accept")) > 2,
            lambda: start_site(nodes, link, texts, "eve"),
        )
        summary = serve(options, link.grid())
        until(lambda: "says that it is client 'eve'; the run has its 2 clients" in caplog.text, 0)
    assert summary["versions"] == 12 and events(folder, "join") == []


def test_documents_that_a_site_adds_count_from_its_next_job_on(texts, tmp_path):
    folder = tmp_path / "run"
    options = load(texts.at_sites("rounds=40", "pace.begin=1", f"run_dir={folder}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        ann = start_site(nodes, link, texts, "ann")
        when(
            lambda: len(events(folder, "accept")) > 3,
            lambda: write_text(texts.of("ann"), "ann", 2, first=50),
        )
        summary = serve(options, link.grid())
        ann.terminate()
        assert ann.stderr is not None
        told = ann.stderr.read()
    assert summary["versions"] == 40 and summary["rejected"] == {}
    assert "the text has changed: 4 documents" in told and "-> 6 documents" in told


@pytest.mark.parametrize("unit", ["example", "local"])
def test_with_privacy_at_the_client_the_text_of_a_run_stays_as_it_was(texts, tmp_path, unit):
    """The site pays for its own blocks, and the server plans with fewer."""
    folder = tmp_path / "run"
    words = [f"privacy={unit}", "privacy.noise_multiplier=2", "privacy.clip=1", "pace.begin=2"]
    options = load(texts.at_sites(*words, "rounds=8", f"run_dir={folder}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in ("ann", "bob"):
            start_site(nodes, link, texts, name)
        when(
            lambda: len(events(folder, "accept")) > 3,
            lambda: write_text(texts.of("ann"), "ann", 2, first=50),
        )
        summary = serve(options, link.grid())
    assert summary["versions"] == 8 and summary["rejected"] == {}
    (ledger,) = (tmp_path / "state" / "ann" / "runs").rglob("ledger.json")
    assert json.loads(ledger.read_text())["events"]


def test_two_sites_cannot_have_one_name(texts, tmp_path, caplog, monkeypatch):
    options = load(texts.at_sites("pace.begin=2", f"run_dir={tmp_path / 'run'}"))
    monkeypatch.setattr("fedgpt.server.loop.SITES_SECONDS", 20)
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for _ in range(2):
            start_site(nodes, link, texts, "ann")
        with pytest.raises(StoppedEarly, match="1 of 2 clients connected within 20 s; left out:"):
            serve(options, link.grid())
    assert not (tmp_path / "run" / "config.yaml").exists()
