"""A run that is made longer when it is resumed: `resume=FOLDER rounds=6`."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.advice import advises
from support.here import run_here, tiny_run

import fedgpt
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.faults import Injected, injected
from fedgpt.storage.checkpoint import Checkpoints

CONSTANT = ["local.warmup=0", "local.lr=0.01", "local.min_lr=0.01"]
STATE = ["strategy=fedadam", "local.moments=keep", "update=int8", "update.error_feedback=true"]


def rounds_of(run: Path) -> int:
    return compose.of_run(run, reading=True).rounds


@pytest.fixture
def words(tmp_path) -> list[str]:
    return [o for o in tiny_run(tmp_path) if not o.startswith(("rounds", "run_dir"))]


@pytest.mark.parametrize("length", ["rounds", "tokens"])
def test_a_longer_run_has_the_bits_of_a_run_that_was_started_with_that_length(
    words, tmp_path, length
):
    each = 1 if length == "rounds" else 64  # tokens of a round: 2 clients x 2 sequences of 16
    run, options = tmp_path / "a", [*words, *CONSTANT, *STATE]
    run_here(*options, f"run_dir={run}", f"{length}={2 * each}")
    longer = fedgpt.run(f"resume={run}", f"{length}={4 * each}").summary
    whole = run_here(*options, f"run_dir={tmp_path / 'b'}", f"{length}={4 * each}")
    assert longer["versions"] == whole["versions"] == 4
    assert longer["weights_sha256"] == whole["weights_sha256"]
    assert getattr(compose.of_run(run), length) == 4 * each


def test_a_schedule_that_follows_the_length_is_reported(words, tmp_path, capsys):
    run_here(*words, "rounds=1", f"run_dir={tmp_path / 'a'}")
    capsys.readouterr()
    assert fedgpt.run(f"resume={tmp_path / 'a'}", "rounds=2").summary["versions"] == 2
    printed = capsys.readouterr().out
    assert "the run goes on to rounds=2 instead of 1. Its learning rate is from here on" in printed
    fedgpt.run(f"resume={tmp_path / 'a'}")
    assert "goes on to" not in capsys.readouterr().out


def test_a_longer_run_that_is_refused_says_nothing_of_its_new_length(words, tmp_path, capsys):
    run = tmp_path / "a"
    run_here(*words, "rounds=1", f"run_dir={run}")
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(metrics.replace('"tokens"', '"tokens_"'))
    for damaged in ("metrics.jsonl", "text"):
        capsys.readouterr()
        with pytest.raises(FedGPTError, match=r"is damaged|text has changed"):
            fedgpt.run(f"resume={run}", "rounds=2")
        assert "goes on to" not in capsys.readouterr().out
        if damaged == "metrics.jsonl":
            (run / "metrics.jsonl").write_text(metrics)
            (tmp_path / "text" / "ann" / "more.txt").write_text("one line more\n")


@pytest.mark.parametrize("point", ["open:1", "checkpoint.renamed:1"])
def test_the_new_length_survives_a_failure_at_any_moment(words, tmp_path, point):
    run = tmp_path / "a"
    options = [*words, *CONSTANT, "checkpoint.every=1"]
    run_here(*options, "rounds=1", f"run_dir={run}")
    with injected(f"{point}:raise"), pytest.raises((Injected, FedGPTError)):
        fedgpt.run(f"resume={run}", "rounds=3")
    assert rounds_of(run) == 3 and not (run / "summary.json").exists()
    longer = fedgpt.run(f"resume={run}").summary
    whole = run_here(*options, "rounds=3", f"run_dir={tmp_path / 'b'}")
    assert longer["weights_sha256"] == whole["weights_sha256"]
    identity = Checkpoints(run / "checkpoints", 9).identity()
    assert identity is not None and identity.options["rounds"] == 3


def test_a_run_that_stops_while_it_writes_its_model_has_none_until_it_is_resumed(words, tmp_path):
    run, model = tmp_path / "a", tmp_path / "a" / "model"
    run_here(*words, "rounds=1", f"run_dir={run}")
    (model / "tokenizer.json").unlink()
    (model / "README.md").unlink()
    (model / "README.md").mkdir()  # so that the export fails after the weights
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises((OSError, FedGPTError)):
        fedgpt.run(f"resume={run}", "rounds=2")
    assert (model / "model.safetensors").read_bytes() != before
    starting = [*words, f"init_from={run}"]
    with pytest.raises(ConfigError, match="is the folder of a run that has not finished"):
        compose.load(starting)
    assert (model / "tokenizer.json").exists(), "the tokenizer comes before what makes it a model"
    (model / "README.md").rmdir()
    fedgpt.run(f"resume={run}")
    assert compose.load(starting).init_from == str(run)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["rounds=1"], "rounds=1: must be a whole number of at least 2"),
        (["rounds=" + "9" * 5000], r"rounds=9{20}\.\.\. \(5000 digits\): must be a whole number"),
        (["rounds=many"], "rounds=many: must be a whole number of at least 2"),
        (["tokens=5000"], "tokens=5000: the length of this run is given by rounds=2"),
        (["rounds=3", "seed=1"], "stands alone"),
        (["local.lr=1"], "stands alone"),
    ],
)
def test_a_run_is_not_made_shorter_nor_changed_otherwise(words, tmp_path, more, message):
    run = tmp_path / "a"
    with injected("aggregate:2:raise"), pytest.raises(Injected):
        run_here(*words, "rounds=2", f"run_dir={run}")
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message) as refused:
        fedgpt.run(f"resume={run}", *more)
    assert (run / "config.yaml").read_text() == before
    if more == ["tokens=5000"]:
        advises(refused.value, "is given by rounds=2; raise that option")
        fedgpt.run(f"resume={run}", "rounds=3")


def test_a_run_with_other_options_in_the_same_folder_is_refused_and_what_it_advises_helps(
    words, tmp_path
):
    run = tmp_path / "a"
    run_here(*words, "rounds=1", f"run_dir={run}")
    with pytest.raises(ConfigError) as refused:
        run_here(*words, "rounds=1", "seed=5", f"run_dir={run}")
    advises(
        refused.value,
        f"name another run_dir, or continue that run with: fedgpt run resume={run}",
    )
    assert run_here(*words, "rounds=1", "seed=5", f"run_dir={tmp_path / 'b'}")["versions"] == 1
    assert fedgpt.run(f"resume={run}").summary["versions"] == 1


def test_a_private_run_is_not_made_longer(words, tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    options = compose.load([*words, "rounds=2", f"run_dir={run}"])
    options.privacy.unit = "client"
    with pytest.raises(ConfigError, match=r"rounds=3: the noise and the epsilon") as refused:
        compose.raised(options, {"rounds": "3"})
    advises(refused.value, "start another run with a plan of its own")
    private = ["privacy=client", "privacy.noise_multiplier=5"]
    compose.load([*words, *private, "rounds=3", f"run_dir={tmp_path / 'b'}"])
    before = compose.flat_options(options)
    options.rounds = 3
    assert compose.changed_options(before, options) == "rounds: 2 -> 3"
    options.privacy.unit = "none"
    assert "rounds" not in compose.changed_options(before, options)


def test_a_folder_in_which_another_process_runs_is_not_changed(words, tmp_path):
    from fedgpt.storage.run_folder import RunFolder

    run = tmp_path / "a"
    run_here(*words, "rounds=1", f"run_dir={run}")
    with RunFolder(run), pytest.raises(FedGPTError, match="another fedgpt process is running"):
        fedgpt.run(f"resume={run}", "rounds=2")
    assert rounds_of(run) == 1 and (run / "summary.json").exists()
