"""Runs over a real SuperLink with sites whose policies refuse some of what they are asked."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.sites import NAMES, Texts, start_site
from support.superlink import LiveSuperLink, live_superlink, persistent_node

from fedgpt.client.account import FILE
from fedgpt.config.compose import load
from fedgpt.core.errors import StoppedEarly
from fedgpt.flower.run_config import run_config_of
from fedgpt.flower.serve import serve

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path) -> Texts:
    return Texts.write(tmp_path)


def start_with_policy(
    nodes: ExitStack, link: LiveSuperLink, texts: Texts, name: str, policy: str
) -> None:
    """A site in a process of its own, with this policy."""
    file = texts.folder / f"{name}.yaml"
    file.write_text(policy)
    patch = nodes.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("POLICY", str(file))
    key = ec.generate_private_key(ec.SECP384R1())
    nodes.enter_context(persistent_node(link, key, "support.policy_site:app", texts.config(name)))


def rejections(folder: Path) -> list[dict]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [one for one in map(json.loads, lines) if one["event"] == "reject"]


def test_a_run_goes_on_without_the_site_whose_policy_refuses_its_jobs(texts, tmp_path):
    options = load(texts.at_sites(f"run_dir={tmp_path / 'run'}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in NAMES[:2]:
            start_site(nodes, link, texts, name)
        start_with_policy(nodes, link, texts, NAMES[2], "most_steps: 1")
        summary = serve(options, link.grid())
    # once in the run: it may be asked again after an hour
    assert summary["versions"] == 3 and summary["rejected"] == {"policy": 1}
    for name in NAMES:  # the model comes to the site that has refused, too
        assert list((tmp_path / "state" / name / "models").glob("*/model.safetensors"))
    (told,) = rejections(tmp_path / "run")
    assert told["client"] == NAMES[2]
    assert "most_steps=1, and the server asks for a job of 2 steps" in json.dumps(told)


def test_what_a_site_has_spent_limits_a_private_run_and_the_server_reads_the_reason(
    texts, tmp_path
):
    private = ["privacy=example", "privacy.target_epsilon=8", "privacy.delta=1e-3", "rounds=2"]
    options = load(texts.at_sites(*private, f"run_dir={tmp_path / 'run'}"))
    limited = "privacy: {units: [example], most_epsilon: %s, delta: 1e-3}"
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name, most in zip(NAMES, ("100", "100", "0.01"), strict=True):
            start_with_policy(nodes, link, texts, name, limited % most)
        summary = serve(options, link.grid())
    assert summary["versions"] == 2 and summary["rejected"] == {"policy": 1}
    assert "privacy.most_epsilon=0.01 for all runs together" in json.dumps(
        rejections(tmp_path / "run")
    )
    spent = [json.loads((tmp_path / "state" / name / FILE).read_text()) for name in NAMES]
    assert [sum(event["count"] for event in one["events"]) for one in spent] == [4, 4, 0]


def test_a_run_that_a_site_refuses_is_told_who_has_refused_it_and_why(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("fedgpt.server.loop.SITES_SECONDS", 30)
    options = load(texts.at_sites(f"run_dir={tmp_path / 'run'}"))
    with live_superlink(run_config_of(options)) as link, ExitStack() as nodes:
        for name in NAMES[:2]:
            start_site(nodes, link, texts, name)
        start_with_policy(nodes, link, texts, NAMES[2], "runs: [another]")
        with pytest.raises(StoppedEarly, match=r"runs=\[another\], and the server asks for name="):
            serve(options, link.grid())
