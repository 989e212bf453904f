"""With privacy=client, every number that may leave the server's folder is classified and checked.

A test fails if a line of metrics, the summary or the run's folder has something that
report/published.py or the lists below do not classify.
"""

from __future__ import annotations

import csv
import json
import re
from functools import partial
from pathlib import Path

import pytest
from support import harness as scripted
from support.fake_transport import honest
from support.here import run_here, tiny_run

from fedgpt.core.options import PrivacyOptions
from fedgpt.privacy.plan import make_plan
from fedgpt.report.figures import loss_figure
from fedgpt.report.progress import size
from fedgpt.report.published import (
    FROM_OPTIONS,
    PUBLISHED,
    SUMMARY,
    SUMMARY_WITHHELD,
    WITHHELD,
    published,
    published_summary,
)
from fedgpt.server.metrics_line import FIRST
from fedgpt.storage.run_folder import read_lines

CLIENTS = {name: partial(honest, seconds=1.0 + index / 8) for index, name in enumerate("abcdefgh")}
SCORES = {"loss", "perplexity", "bits_per_byte"}
WRITTEN = {
    "prompt",
    "sample",
}  # in lines of versions with a sample, which the harness does not make
# everything in a run's folder: what privacy.md asks to publish, and what it asks to keep
SHOWN = {"model", "samples.md", "summary.json", "report.html", "metrics.csv"}
KEPT = {
    ".lock",
    "checkpoints",
    "clients",
    "command.txt",
    "config.yaml",
    "environment.json",
    "events.jsonl",
    "figures",
    "tokenizer",
    "ledger.json",
    "metrics.jsonl",
    "privacy.key",
    "wal",
}


def run(folder: Path, seed: int, **pace) -> scripted.Outcome:
    o = scripted.options(folder, 6, **(pace or {"rate": 0.5, "clients": 0}))
    o.seed = seed
    o.privacy = PrivacyOptions(unit="client", noise_multiplier=3.0, clip=0.1, rng="seeded")
    return scripted.run(o, CLIENTS, plan=make_plan(o, [10_000] * len(CLIENTS)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[scripted.Outcome]:
    """Two runs with the same options, in which different clients took part."""
    folder = tmp_path_factory.mktemp("runs")
    return [run(folder / f"{seed}", seed) for seed in (1, 2)]


def test_every_field_of_a_line_of_metrics_is_classified(runs):
    found = set().union(FIRST, *(line.keys() for one in runs for line in one.metrics))
    assert found - SCORES == (PUBLISHED.keys() | WITHHELD) - WRITTEN
    assert not PUBLISHED.keys() & WITHHELD


def test_every_field_of_the_summary_is_classified(runs):
    assert runs[0].summary.keys() == SUMMARY.keys() | SUMMARY_WITHHELD
    assert not SUMMARY.keys() & SUMMARY_WITHHELD
    for end in ("initial", "final", "best"):
        assert runs[0].summary[end].keys() == {"version", *SCORES}


def test_what_is_computed_from_the_options_is_the_same_whoever_took_part(runs):
    one, two = runs
    assert one.accepted != two.accepted
    for name, kind in PUBLISHED.items():
        if kind == FROM_OPTIONS and name not in WRITTEN:
            assert [line[name] for line in one.metrics] == [line[name] for line in two.metrics]
    for name, kind in SUMMARY.items():
        if kind == FROM_OPTIONS:
            assert one.summary[name] == two.summary[name], name
    # the reason for all this: these tell how many took part
    assert one.summary["bytes_up"] != two.summary["bytes_up"]
    assert one.summary["virtual_seconds"] != two.summary["virtual_seconds"]


def test_a_withheld_number_of_the_summary_is_null_and_a_new_one_is_not_shown(runs):
    shown = published_summary({**runs[0].summary, "brand_new": 3})
    assert {name for name, value in shown.items() if value is None} >= {
        *SUMMARY_WITHHELD,
        "brand_new",
    }
    assert shown["final"] == runs[0].summary["final"] and shown["tokens"] > 0
    line = published({**runs[0].metrics[-1], "brand_new": 3}, SCORES)
    assert "brand_new" not in line and {"loss", "epsilon"} <= line.keys()


def test_lines_without_bytes_have_a_figure(tmp_path):
    loss_figure([{"version": 0, "tokens": 0, "loss": 2.0}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_published_files_of_a_run_tell_nothing_about_who_took_part(tmp_path):
    run_here(
        *tiny_run(tmp_path),
        *("privacy=client", "pace.rate=0.5", "pace.clients=0", "track=[csv]"),
        *("privacy.noise_multiplier=3", "privacy.target_epsilon=null", "privacy.delta=0.004"),
    )
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names <= SHOWN | KEPT and names >= SHOWN
    assert {path.name for path in (folder / "model").iterdir()} == {
        "README.md",
        "SHA256SUMS",
        "generation_config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert {name for name, value in summary.items() if value is None} == SUMMARY_WITHHELD
    with (folder / "metrics.csv").open(newline="") as stream:
        columns = csv.DictReader(stream).fieldnames or ()
    assert set(columns) <= PUBLISHED.keys() | SCORES and "epsilon" in columns
    last = list(read_lines(folder / "metrics.jsonl"))[-1]
    report = (folder / "report.html").read_text()
    assert re.findall(r'<img alt="(\w+)"', report) == ["loss"], "no figure of clients or updates"
    page = re.sub(r"<img[^>]*>", "", report)
    moved = [size(last[way]) for way in ("bytes_up", "bytes_down") if last[way]]
    for word in ("tok/s", "<th>up</th>", "updates rejected</", *moved):
        assert word not in page
    assert "which depend on the clients that took part" in page
    texts = ("summary.json", "samples.md", "report.html", "metrics.csv", "model/README.md")
    for name in texts:
        assert not re.search(r"\b(ann|bob)\b", (folder / name).read_text()), name
