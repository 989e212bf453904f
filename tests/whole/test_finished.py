"""A complete run on the pool, and the same run through Python: their files and their numbers."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
from support.world import PARAMETERS, WRITERS, files, summary, untimed

from fedgpt.core.files import sha256_of
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.run_folder import read_lines


def test_a_run_leaves_exactly_the_documented_files(finished):
    folder = finished.folder
    (run,) = (folder / "clients").iterdir()
    assert finished.files.keys() == {
        ".lock",
        "config.yaml",
        "command.txt",
        "environment.json",
        "metrics.jsonl",
        "events.jsonl",
        "summary.json",
        "samples.md",
        "report.html",
        "figures/loss.png",
        "figures/timeline.png",
        "figures/updates.png",
        "model/config.json",
        "model/generation_config.json",
        "model/SHA256SUMS",
        "model/model.safetensors",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "model/README.md",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "checkpoints/best.safetensors",
        *(
            f"checkpoints/version-0000000{v}.{end}"
            for v in (1, 2)
            for end in ("safetensors", "sha256")
        ),
        *(
            f"clients/{run.name}/{writer}/task-{number}.safetensors"
            for writer in WRITERS
            for number in (0, 1)
        ),
    }


def test_every_version_is_a_line_of_metrics(finished):
    records = list(read_lines(finished.folder / "metrics.jsonl"))
    assert [r["version"] for r in records] == [0, 1, 2]
    tokens = len(WRITERS) * 2 * 2 * 16
    for r in records:
        assert {
            "version",
            "tokens",
            "wall_seconds",
            "bytes_up",
            "bytes_down",
            "accepted",
            "rejected",
            "staleness",
            "train_loss",
            "lr",
            "update_norm",
            "step_norm",
            "loss",
            "perplexity",
            "bits_per_byte",
        } <= r.keys()
        assert r["tokens"] == tokens * r["version"]
        assert r["perplexity"] == pytest.approx(math.exp(r["loss"]))
        assert r["rejected"] == {} and r["state_lost"] == 0
    for r in records[1:]:
        assert (
            r["accepted"] == 3
            and r["staleness"] == {"0": 3}
            and 0 < r["step_norm"] <= r["update_norm"]
        )
        vector = 4 * PARAMETERS
        assert 3 * vector < r["bytes_up"] / r["version"] < 3 * vector + 3000
        assert 3 * vector < r["bytes_down"] / r["version"] < 3 * vector + 3000
    assert records[2]["loss"] < records[0]["loss"] - 0.01, "it learned"


def test_the_summary_has_its_keys_and_agrees_with_metrics_and_checkpoint(finished):
    folder = finished.folder
    found, records = summary(folder), list(read_lines(folder / "metrics.jsonl"))
    assert found.keys() == {
        "versions",
        "tokens",
        "wall_seconds",
        "virtual_seconds",
        "bytes_up",
        "bytes_down",
        "score",
        "higher_is_better",
        "initial",
        "final",
        "best",
        "weights_sha256",
        "rejected",
        "epsilon",
        "delta",
        "private",
    }
    assert (
        found["versions"] == 2
        and found["tokens"] == records[-1]["tokens"]
        and found["wall_seconds"] > 0
    )
    assert (found["score"], found["higher_is_better"]) == ("loss", False)
    for name, record in (
        ("initial", records[0]),
        ("final", records[2]),
        ("best", min(records, key=lambda r: r["loss"])),
    ):
        assert found[name] == {
            key: record[key] for key in ("version", "loss", "perplexity", "bits_per_byte")
        }
    assert (found["virtual_seconds"], found["epsilon"], found["delta"], found["rejected"]) == (
        None,
        None,
        None,
        {},
    )
    snapshot = Checkpoints(folder / "checkpoints", 2).load()
    assert snapshot.state.version == 2
    assert hashlib.sha256(snapshot.state.params.tobytes()).hexdigest() == found["weights_sha256"]
    assert snapshot.state.params.size == PARAMETERS


def test_the_environment_that_bit_identity_depends_on_is_recorded(finished):
    environment = Checkpoints(finished.folder / "checkpoints", 2).load().identity.environment
    assert environment.keys() == {
        "fedgpt",
        "torch",
        "flwr",
        "numpy",
        "python",
        "device",
        "dtype",
        "threads",
        "cpu",
        "gpu",
        "text",
        "tokenizer",
        "shards",
    }
    assert (environment["threads"], environment["dtype"], environment["device"]) == (
        1,
        "fp32",
        "cpu",
    )
    written = json.loads((finished.folder / "environment.json").read_text())
    for name in ("text", "shards"):  # with a digest a guess of private text could be confirmed
        del environment[name]
    assert written == environment
    assert "threads: 1" in (finished.folder / "config.yaml").read_text()


def test_the_command_is_stored_in_shell_syntax(finished, world):
    words = shlex.split((finished.folder / "command.txt").read_text())
    assert words[:2] == ["fedgpt", "run"] and set(world.options) < set(words)


def test_events_name_the_client_of_every_job_and_of_every_update(finished):
    events = list(read_lines(finished.folder / "events.jsonl"))
    for kind in ("dispatch", "accept"):
        named = {(e["client"], e["number"], e["version"]) for e in events if e["event"] == kind}
        assert named == {(writer, version, version) for writer in WRITERS for version in (0, 1)}
    assert [e["version"] for e in events if e["event"] == "version"] == [1, 2]
    seconds = [e["seconds"] for e in events]
    assert seconds == sorted(seconds)


def test_samples_figure_and_output_belong_to_this_run(finished):
    folder, out = finished.folder, finished.out
    page = (folder / "samples.md").read_text(encoding="utf-8")
    assert [line.split(":")[0] for line in page.splitlines() if line.startswith("## ")] == [
        "## Version 0",
        "## Version 1",
        "## Version 2",
    ]
    assert page.count("```text\nThe river") == 3
    import matplotlib.image

    assert matplotlib.image.imread(folder / "figures" / "loss.png").std() > 0
    assert "version 0/2" in out and "version 2/2" in out and "2 workers x 1 thread" in out
    assert (
        f"sha256 {summary(folder)['weights_sha256'][:16]}" in out
        and f"fedgpt generate {folder}" in out
    )


def test_the_report_is_one_page_that_needs_no_other_file(finished):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    found = summary(finished.folder)
    assert (
        page.count("data:image/png;base64,") == 3
        and "http" not in page
        and 'src="figures' not in page
    )
    assert f"sha256 {found['weights_sha256'][:16]}" in page and "seed: 11" in page
    assert page.count("<tr>") == 1 + 3
    assert f"<td>2</td><td>{found['tokens']}</td><td>{found['final']['loss']:.4f}</td>" in page


def test_transformers_loads_the_model_and_computes_the_same(finished):
    transformers = pytest.importorskip("transformers")
    import torch

    from fedgpt.api import open_run

    ours = open_run(finished.folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        finished.folder / "model", local_files_only=True, dtype=torch.float32
    ).eval()
    ids = torch.tensor([ours.tokenizer.encode("The river rose").tolist()])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        finished.folder / "model", local_files_only=True
    )
    assert tokenizer("The river rose")["input_ids"] == ids[0].tolist()


# ---- the same through Python


def test_the_number_of_workers_changes_no_bit(finished, results, world):
    assert results["alone"] | {"wall_seconds": 0} == finished.summary | {"wall_seconds": 0}
    assert untimed(Path(results["folder"])) == finished.records
    assert results["folder"] == str(world.root / "alone")


def test_starting_a_finished_run_again_changes_nothing(finished, results):
    assert results["repeated"] == finished.summary
    assert untimed(finished.folder) == finished.records
    now = {
        name: sha256_of(finished.folder / name)
        for name in files(finished.folder)
        if name != "failure.json"
    }
    assert now == finished.files


def test_a_run_is_resumed_from_python(results):
    assert results["resumed"] | {"wall_seconds": 0} == results["alone"] | {"wall_seconds": 0}
    assert "resume=alone: stands alone" in results["resumed with more"]


def test_resetting_the_moments_of_clients_changes_the_weights(results):
    assert results["reset"]["weights_sha256"] != results["alone"]["weights_sha256"]
    assert results["reset"]["initial"] == results["alone"]["initial"]
    assert math.isfinite(results["reset"]["final"]["loss"])


def test_a_run_with_other_options_in_the_same_folder_is_refused_with_their_names(finished, results):
    assert (
        f"run_dir={finished.folder}: contains another run, which differs in local.lr, seed"
        in results["refused"]
    )
    assert f"fedgpt run resume={finished.folder}" in results["refused"]
    assert results["opened"] == results["repeated"], "nothing in the folder changed"


def test_a_refused_run_leaves_no_file_in_the_folder_of_the_other_run(finished, results):
    assert not (finished.folder / "failure.json").exists()


def test_an_opened_run_has_its_numbers_and_generates_text(results, finished):
    assert results["opened"]["final"].items() <= results["metrics"][-1].items()
    assert [r["version"] for r in results["metrics"]] == [0, 1, 2]
    assert results["texts"] == results["again"] != results["other"]
    assert len(results["texts"]) == 2 and all(0 < len(text) <= 12 for text in results["texts"])
    assert len(results["empty"]) == 1
    assert "is not a run's folder" in results["no run"]


def test_generate_prints_the_prompt_and_is_seeded(world, finished, results):
    arguments = ["--prompt", "The river", "--tokens", "12", "--samples", "2", "--seed", "3"]
    done = world.fedgpt("generate", str(finished.folder), *arguments)
    first, second = (f"The river{text}" for text in results["texts"])
    assert done.stdout == f"{first}\n{'-' * 40}\n{second}\n"


def test_generate_can_use_the_best_weights(world, finished):
    """The loss of this run fell in every version, so its best weights are its newest."""
    arguments = ["--prompt", "The river", "--tokens", "8", "--seed", "3"]
    newest = world.fedgpt("generate", str(finished.folder), *arguments)
    assert (
        world.fedgpt("generate", str(finished.folder), *arguments, "--best").stdout == newest.stdout
    )
    bare = world.root / "bare"
    shutil.copytree(finished.folder, bare)
    (bare / "checkpoints" / "best.safetensors").unlink()
    assert (
        "has no best weights"
        in world.fedgpt("generate", str(bare), *arguments, "--best", code=1).stderr
    )
