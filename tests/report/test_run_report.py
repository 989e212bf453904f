"""The texts before and after a run, the page of samples, the report and the model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgpt.core.messages import ClientInfo, ServerState
from fedgpt.core.options import (
    AttackOptions,
    CorpusOptions,
    LocalOptions,
    ModelOptions,
    PaceOptions,
    PartitionOptions,
    RunOptions,
    TokenizerOptions,
)
from fedgpt.data.partition import partition
from fedgpt.data.prepare import prepare
from fedgpt.report.model_card import model_card
from fedgpt.report.page import report_page
from fedgpt.report.run_report import opening, samples_page, summary_text
from fedgpt.storage.checkpoint import Snapshot
from fedgpt.storage.tables import RunIdentity, VersionLine

COMPUTE = "cpu, bf16 (this CPU has AMX bf16 units), 2 workers x 1 thread (2 cores)"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in ("ann", "bob", "eve", "joe"):
        (folder / name).mkdir()
        for page in range(5):
            (folder / name / f"{page}.txt").write_text(
                f"{name} saw the river rise on page {page}. " * 10
            )
    corpus = CorpusOptions(
        name="files", client="folder", path=str(folder), public=0.1, held_out=0.1
    )
    return prepare(corpus, TokenizerOptions(name="bytes"), folder / "cache")


def opening_text(prepared, version=0, attack=None, **pace) -> tuple[str, int]:
    options = RunOptions(
        run_dir="/runs/x",
        rounds=9,
        corpus=CorpusOptions(name="files"),
        tokenizer=TokenizerOptions(name="bytes"),
        model=ModelOptions(n_layer=2, n_embd=32, block_size=16, positions="learned"),
        local=LocalOptions(steps=10, batch_size=4, accumulate=2),
        strategy={"_target_": "fedgpt.aggregate.fedadam.FedAdam", "eta": 0.1},
        pace=PaceOptions(**{"clients": 0, **pace}),
        attack=attack or AttackOptions(),
    )
    shards = partition(prepared, PartitionOptions(), 0, 17)
    snapshot = Snapshot(
        ServerState(np.zeros(25_000, np.float32), version), RunIdentity("run"), VersionLine({})
    )
    clients = [ClientInfo(shard.client, shard.size) for shard in shards]
    text = opening(options, prepared, clients, snapshot, COMPUTE, 4321)
    return text, sum(shard.size for shard in shards)


def test_the_opening_shows_every_choice_and_what_follows_from_it(prepared):
    text, tokens = opening_text(prepared, clients=3)
    assert 1000 < tokens < 10_000
    assert text == "\n".join(
        [
            "       run  /runs/x",
            f"      text  files: {tokens / 1000:.3g}k tokens at 4 clients, 4,321 held-out tokens",
            " tokenizer  bytes, 257 entries",
            "     model  25k parameters: 2 layers, width 32, context 16",
            # 10 steps x 2 micro-batches x 4 sequences x 16 tokens x 3 clients; each way, three
            # clients send 25,000 parameters as float32
            "     round  FedAdam: 3 of 4 clients x 10 steps = 3.84k tokens, 300 kB each way",
            "   compute  cpu, bf16 (this CPU has AMX bf16 units), 2 workers x 1 thread (2 cores)",
        ]
    )


@pytest.mark.parametrize(
    "pace, part",
    [
        ({"clients": 0}, "4 of 4 clients"),
        ({"clients": 50}, "4 of 4 clients"),
        # 8 is the default of pace.clients; two clients take part on average
        (
            {"rate": 0.5, "clients": 8},
            "each of 4 with p=0.5 x 10 steps = 2.56k tokens, 200 kB each way",
        ),
    ],
)
def test_the_opening_shows_how_many_clients_take_part(prepared, pace, part):
    assert part in opening_text(prepared, **pace)[0]


def test_the_opening_shows_an_attack(prepared):
    text = opening_text(prepared, attack=AttackOptions("scale", clients=2, strength=10.0))[0]
    assert (
        text.splitlines()[-1]
        == "    attack  scale of strength 10 by 2 of 4 clients, for research only"
    )


def test_the_opening_of_a_resumed_run_shows_its_version(prepared):
    assert (
        opening_text(prepared, version=4)[0].splitlines()[-1] == "    resume  from version 4 of 9"
    )


def score(version: int, loss: float) -> dict:
    return {"version": version, "loss": loss, "perplexity": 2.0**loss, "bits_per_byte": loss / 4}


SUMMARY = {
    "tokens": 384_000,
    "wall_seconds": 120.0,
    "virtual_seconds": None,
    "bytes_up": 5_300_000,
    "bytes_down": 5_400_000,
    "initial": score(0, 8.0),
    "final": score(2, 6.0),
    "best": score(1, 5.0),
    "weights_sha256": "0123456789abcdef" * 4,
    "rejected": {"late": 2, "non_finite": 1},
}
METRICS = [
    {**score(0, 8.0), "prompt": "The river", "sample": " was first."},
    score(1, 5.0),
    {**score(2, 6.0), "prompt": "The river", "sample": " rose again.  "},
]

GOLDEN = """
held-out bits per byte  2.000 -> 1.500   (perplexity 256 -> 64.0; best 1.250 at version 1)
trained                 384k tokens in 2:00 = 3.2k tok/s
traffic                 5.3 MB up, 5.4 MB down, 3 updates rejected
weights                 sha256 0123456789abcdef

The river rose again.

results are in /runs/x: report.html, samples.md, figures/, metrics.jsonl, model/
more text: fedgpt generate /runs/x --prompt "..."
"""


def test_the_summary_shows_scores_speed_traffic_and_the_newest_sample():
    assert summary_text(SUMMARY, METRICS, Path("/runs/x")) + "\n" == GOLDEN


def test_a_summary_without_samples_or_time():
    text = summary_text({**SUMMARY, "wall_seconds": 0.0}, [score(0, 8.0)], Path("/runs/x"))
    assert "0 tok/s" in text and "\n\n" not in text


def test_the_command_for_more_text_can_be_pasted():
    assert "fedgpt generate '/my runs/x' --prompt" in summary_text(
        SUMMARY, METRICS, Path("/my runs/x")
    )


def test_a_byte_model_cannot_write_control_codes_to_the_terminal():
    wild = {**METRICS[2], "sample": " rose\x1b[2J\x00 and\tfell\nagain"}
    text = summary_text(SUMMARY, [wild], Path("/runs/x"))
    assert "The river rose\ufffd[2J\ufffd and\tfell\nagain" in text
    assert "\x1b" not in samples_page([wild]) and "\x00" not in samples_page([wild])


def test_every_sampled_version_is_a_section_of_the_page():
    assert samples_page(METRICS) == (
        "# Samples\n\n"
        "## Version 0: 2.000 bits per byte\n\n```text\nThe river was first.\n```\n\n"
        "## Version 2: 1.500 bits per byte\n\n```text\nThe river rose again.  \n```\n"
    )


def test_a_sample_cannot_end_its_own_block():
    page = samples_page([{**METRICS[0], "sample": "\n```\n# not a heading"}])
    assert page.count("```") == 2


def test_a_page_without_samples_is_only_its_title():
    assert samples_page([score(0, 8.0)]) == "# Samples\n"


# ---- another task, which is judged by its accuracy


def of_accuracy(version: int, accuracy: float, loss: float) -> dict:
    return {"version": version, "accuracy": accuracy, "loss": loss}


LABELLED = {
    **SUMMARY,
    "versions": 2,
    "score": "accuracy",
    "initial": of_accuracy(0, 0.25, 1.5),
    "final": of_accuracy(2, 0.75, 0.5),
    "best": of_accuracy(1, 0.875, 0.625),
    "epsilon": None,
}


def test_the_summary_of_another_task_names_its_score():
    line = summary_text(LABELLED, [], Path("/runs/x")).splitlines()[1]
    assert line == (
        "held-out accuracy       0.250 -> 0.750   (loss 1.500 -> 0.500; best 0.875 at version 1)"
    )


def test_samples_of_another_task_are_shown_with_its_score():
    line = {**of_accuracy(3, 0.75, 0.5), "prompt": "Good?", "sample": " yes"}
    assert "## Version 3: accuracy 0.750\n" in samples_page([line], "accuracy")


def test_the_report_of_another_task_has_a_column_for_its_score(tmp_path):
    for name in ("command.txt", "config.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    traffic = {"tokens": 7, "bytes_up": 1, "bytes_down": 1}
    page = report_page(LABELLED, [{**of_accuracy(2, 0.75, 0.5), **traffic}], tmp_path)
    assert "<th>tokens</th><th>held-out accuracy</th><th>up</th>" in page
    assert "<td>7</td><td>0.7500</td><td>1 B</td>" in page and "bits per byte" not in page


@pytest.mark.parametrize(
    "summary, table",
    [
        (
            {**SUMMARY, "versions": 2},
            [
                "| held-out text | loss | perplexity | bits per byte |",
                "|---|---|---|---|",
                "| last version | 6.0000 | 64.00 | 1.5000 |",
            ],
        ),
        (
            LABELLED,
            [
                "| held-out text | accuracy | loss |",
                "|---|---|---|",
                "| last version | 0.7500 | 0.5000 |",
            ],
        ),
    ],
    ids=["lm", "accuracy"],
)
def test_a_model_card_has_every_score(summary, table):
    options = RunOptions(strategy={"_target_": "fedgpt.aggregate.fedavg.FedAvg"})
    card = model_card(options, summary, {})
    assert "\n".join(table) in card and "## Privacy\n\nNone: the model may repeat texts" in card


# ---- the report


def test_the_report_escapes_text(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "command.txt").write_text("fedgpt run 'evaluate.prompt=<b>'\n")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    records = [{**score(v, 4.0), "tokens": v, "bytes_up": 1, "bytes_down": 1} for v in range(100)]
    records[-1] |= {"prompt": "Once", "sample": "<script>alert(1)</script>"}
    page = report_page(SUMMARY, records, tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page and "=&lt;b&gt;" in page
    assert page.count("<tr>") == 1 + 34 and "<td>0</td>" in page and "<td>99</td>" in page


def test_the_report_of_a_private_run_does_not_show_when_clients_took_part(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("loss", "timeline", "updates"):
        (tmp_path / "figures" / f"{name}.png").write_bytes(name.encode())
    for name in ("command.txt", "config.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    open_run, private = (
        report_page({**SUMMARY, "epsilon": e, "delta": e, "private": True}, [], tmp_path)
        for e in (None, 1e-3)
    )
    assert [f'alt="{name}"' in open_run for name in ("loss", "timeline", "updates")] == [
        True,
        True,
        True,
    ]
    assert [f'alt="{name}"' in private for name in ("loss", "timeline", "updates")] == [
        True,
        False,
        False,
    ]
