"""Runs over a real SuperLink with persistent clients."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.here import SMALL
from support.superlink import live_superlink, persistent_node

from fedgpt.api import run
from fedgpt.config.compose import load
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve
from fedgpt.storage.journal import Journal


@pytest.mark.slow
def test_a_run_with_persistent_clients_has_the_weights_of_the_pool(tmp_path, monkeypatch):
    pool = run(*SMALL, f"run_dir={tmp_path / 'pool'}").summary
    logged, append = [], Journal.append
    monkeypatch.setattr(
        Journal, "append", lambda self, entry: (logged.append(entry.call), append(self, entry))
    )
    options = load([*SMALL, f"run_dir={tmp_path / 'run'}"])
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        processes = []
        for index in range(2):
            config = {"partition-id": index, "num-partitions": 2}
            config["state-dir"] = str(tmp_path / "state")
            key = ec.generate_private_key(ec.SECP384R1())
            app = "fedgpt.flower.client_app:app"
            processes.append(nodes.enter_context(persistent_node(link, key, app, config)))
        serve(options, link.grid())
        for process in processes:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["weights_sha256"] == pool["weights_sha256"]
    assert summary["final"] == pool["final"] and summary["rejected"] == {}
    assert "step" in logged, "a run with real clients keeps a journal, whatever its options say"
