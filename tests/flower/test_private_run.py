"""Complete private runs in this process, and the privacy commands."""

from __future__ import annotations

import json
import re

import pytest
from support import mechanism
from support.here import run_here, tiny_run

import fedgpt
from fedgpt.cli import audit, privacy
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.faults import Injected, injected
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.run_folder import read_lines

COINS = ["privacy=client", "pace.rate=0.5", "pace.clients=0"]
BUFFER = [
    "privacy=client",
    "pace=buffer",
    "strategy=fedbuff",
    "pace.clients=2",
    "pace.goal=2",
    "privacy.participations=3",
]
FIXED = ["privacy=client", "pace.clients=2"]
CHOICES = {
    "example": ["privacy=example"],
    "opacus": ["privacy=example", "privacy.engine=opacus"],
    "coins": COINS,
    "fixed": FIXED,
    "buffer": BUFFER,
    "local": ["privacy=local"],
}


@pytest.fixture
def options(tmp_path) -> list[str]:
    # the watchdog needs the real stderr, which capsys replaces
    return [*tiny_run(tmp_path), "privacy.delta=0.004", "runtime.watchdog=0"]


@pytest.mark.parametrize("name", CHOICES)
def test_a_private_run_reports_its_guarantee_and_its_cost(tmp_path, options, name, capsys):
    summary = run_here(
        *options, *CHOICES[name], "privacy.noise_multiplier=3", "privacy.target_epsilon=null"
    )
    printed = capsys.readouterr().out
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    spent = epsilon_of([Event(**event) for event in ledger["events"]], 0.004)
    assert (
        summary["epsilon"] == pytest.approx(spent) and 0 < spent < 20 and summary["delta"] == 0.004
    )
    assert summary["private"] and f"epsilon {summary['epsilon']:.4g}" in printed
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for words in ("protects", "trusts", "not covered", "held-out part"):
        assert words in printed and words in card
    kept = Checkpoints(tmp_path / "run" / "checkpoints", 1).load().identity.privacy
    assert kept["delta"] == 0.004 and kept["not_covered"]
    last = list(read_lines(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert last["epsilon"] == summary["epsilon"] and last["train_loss"] is None


def test_every_epsilon_of_seeded_noise_is_called_not_private(tmp_path, options, capsys):
    summary = run_here(*options, *FIXED, "privacy.rng=seeded")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert not summary["private"]
    page = (tmp_path / "run" / "report.html").read_text()
    for text in (capsys.readouterr().out, card, page):
        # the statement has a row of its own, and so a mark above its epsilon
        said = [line for line in text.splitlines() if re.search(r"epsilon [\d.]+ ?", line)]
        assert said and all("NOT PRIVATE" in line or "as planned" in line for line in said)
    assert "NOT PRIVATE" in card


@pytest.mark.parametrize("gone", [["privacy.key"], ["privacy.key", "ledger.json"]], ids=" ".join)
def test_a_stopped_run_is_not_resumed_without_key_or_ledger(tmp_path, options, gone):
    """Without both it would look like a new run, which has spent nothing yet."""
    with injected("aggregate:3:raise"), pytest.raises(Injected):
        run_here(*options, *FIXED, "checkpoint.every=1")
    for name in gone:
        (tmp_path / "run" / name).unlink()
    with pytest.raises(FedGPTError, match=rf"{gone[-1]} is missing"):
        fedgpt.run(f"resume={tmp_path / 'run'}")


@pytest.mark.parametrize("name", [*CHOICES, "correlated"])
def test_the_plan_has_the_cost_of_shorter_longer_and_noisier_runs(options, name, capsys):
    correlated = [*FIXED, "pace.clients=1", "privacy.bands=2", "privacy.separation=2"]
    chosen = correlated if name == "correlated" else CHOICES[name]
    noise = ["privacy.noise_multiplier=2", "privacy.target_epsilon=null"]
    code = privacy.main(["plan", *options, *chosen, *noise, "rounds=4"])
    table = [
        [float(cell) for cell in line.split()] for line in capsys.readouterr().out.splitlines()[-3:]
    ]
    assert code == 0 and [row[0] for row in table] == [1.0, 2.0, 4.0]
    for noise, planned, half, twice in table:
        assert noise > 0 and half <= planned <= twice
        assert half < twice or name == "buffer", "fixed by the options"
    assert table[0][1] > table[1][1] > table[2][1]


@pytest.mark.parametrize("name", ["none", "example", "coins"])
def test_an_audit_ends_with_a_line_for_scripts(options, name, capsys, monkeypatch):
    monkeypatch.setattr("fedgpt.audit.attacks.MEMBER_STEPS", 3)
    chosen = (
        ["privacy.delta=null"]
        if name == "none"
        else [*CHOICES[name], "privacy.noise_multiplier=4", "privacy.target_epsilon=null"]
    )
    code = audit.main([*options, *chosen])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert code == (0 if found.get("holds", True) else 1)
    assert 0 <= found["membership"]["auc"] <= 1 and 0 <= found["token_leak"]["auc"] <= 1
    assert ("released_auc" in found["token_leak"]) == (name == "coins")
    assert ("claimed_mu" in found) == (name != "none")


def test_an_audit_that_refutes_the_guarantee_has_exit_code_1(options, capsys, monkeypatch):
    monkeypatch.setattr("fedgpt.audit.attacks.MEMBER_STEPS", 3)
    noise = ["privacy.noise_multiplier=4", "privacy.target_epsilon=null"]
    with mechanism.no_noise():
        assert audit.main([*options, *COINS, *noise]) == 1
    printed = capsys.readouterr().out
    assert "canaries: one release, 600 canary clients" in printed
    assert "THE GUARANTEE IS REFUTED" in printed and "the guarantee holds" not in printed


def test_noise_below_the_budget_is_refused_before_the_runtime_starts(options, monkeypatch):
    def planned(*_, **__):
        raise AssertionError("processes are planned before the noise is compared with the budget")

    monkeypatch.setattr("fedgpt.flower.launch.resources_for", planned)
    with pytest.raises(
        ConfigError,
        match="leave the noise out, so that it follows from the target, or lower rounds",
    ):
        run_here(
            *options, "privacy=example", "privacy.noise_multiplier=0.5", "privacy.target_epsilon=1"
        )
