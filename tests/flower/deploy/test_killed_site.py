"""A persistent client that is killed when its work is done and nothing of it is sent."""

from __future__ import annotations

import json
import signal
import threading
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.sites import NAMES, Texts, start_site
from support.superlink import live_superlink, persistent_node

from fedgpt.client.account import FILE
from fedgpt.config.compose import load
from fedgpt.flower import fetch
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve
from fedgpt.storage.run_folder import read_lines

pytestmark = pytest.mark.slow
PRIVATE = ["privacy=example", "privacy.target_epsilon=8", "privacy.delta=1e-3"]
APP = "fedgpt.flower.client_app:app"


@pytest.mark.parametrize("private", [False, True])
def test_a_job_whose_client_is_killed_before_the_upload_is_repeated_and_counts_once(
    tmp_path, monkeypatch, private
):
    """Without privacy the bits are those of a run without a kill; with it, it is charged once."""
    monkeypatch.setattr(fetch, "NODES_SECONDS", 0.1)
    texts, folder = Texts.write(tmp_path), tmp_path / "run"
    options = load(texts.at_sites(*(PRIVATE if private else []), f"run_dir={folder}"))
    key, killed = ec.generate_private_key(ec.SECP384R1()), []
    (tmp_path / "marks").mkdir()
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in NAMES[1:]:
            start_site(nodes, link, texts, name)
        with pytest.MonkeyPatch.context() as patch:  # the restarted process counts on from there
            patch.setenv("FEDGPT_FAULT", "client.done:2:kill")
            patch.setenv("FEDGPT_FAULT_MARKS", str(tmp_path / "marks"))
            config = texts.config(NAMES[0])
            first = nodes.enter_context(persistent_node(link, key, APP, config))

            def restart() -> None:
                killed.append(first.wait(120))
                link.lose(link.registered(key))
                nodes.enter_context(persistent_node(link, key, APP, config))

            restarting = threading.Thread(target=restart)
            restarting.start()
            summary = serve(options, link.grid())
            restarting.join()
    assert killed == [-signal.SIGKILL]
    assert (tmp_path / "marks" / "client.done.2").stat().st_size == 4, "3 jobs, one of them twice"
    assert summary["versions"] == 3 and summary["rejected"] == {}
    events = read_lines(folder / "events.jsonl")
    accepted = [(one["client"], one["number"]) for one in events if one["event"] == "accept"]
    assert sorted(accepted) == [(name, number) for name in NAMES for number in range(3)]
    if not private:
        pool = texts.in_one_place(f"run_dir={tmp_path / 'pool'}")
        assert summary["weights_sha256"] == pool["weights_sha256"]
        return
    state = tmp_path / "state"
    for name in NAMES:
        (ledger,) = (state / name / "runs").glob("*/*/ledger.json")
        for file in (state / name / FILE, ledger):
            (charged,) = json.loads(file.read_text())["events"]
            assert charged["count"] == 3 * 2, "3 jobs of 2 steps"
