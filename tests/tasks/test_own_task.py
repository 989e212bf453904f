"""A task and metrics from outside the package: options, scores and best weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.advice import advises
from support.here import run_here, tiny_run
from support.labels_task import DocumentLabel

from fedgpt.cli.run import sweep_score
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import ServerState
from fedgpt.core.options import EvaluateOptions, RunOptions
from fedgpt.core.score import Score
from fedgpt.storage.best_weights import BestWeights
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.tables import RunIdentity, VersionLine

TASK = ("task=custom", "task._target_=support.labels_task.DocumentLabel")
TRUST = "trusted_packages=[support]"
METRICS = (
    "metrics=[accuracy,{_target_:support.labels_task.TopTokens,k:1},"
    "{_target_:support.labels_task.SampleLength}]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished run that learns to classify texts by their writer."""
    root = tmp_path_factory.mktemp("labels")
    changed = {
        "rounds": 6,
        "local.steps": 4,
        "local.lr": 0.03,
        "local.batch_size": 4,
        "evaluate.samples": 2,
        "evaluate.sample_tokens": 10,
        "evaluate.every": 1,
        "corpus.held_out": 0.4,
    }
    kept = [word for word in tiny_run(root) if word.split("=")[0] not in changed]
    typed = [f"{name}={value}" for name, value in changed.items()]
    run_here(*kept, *typed, *TASK, "task.arguments={length: 10}", TRUST, METRICS)
    return root / "run"


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_judged_by_the_score_of_its_task(folder):
    summary = json.loads((folder / "summary.json").read_text())
    scores = [line["right"] for line in lines(folder)]
    assert summary["score"] == "right" and summary["higher_is_better"] is True
    assert len(scores) == 7 and len(set(scores)) > 1
    best = int(np.argmax(scores))
    assert summary["best"]["version"] == best and summary["best"]["right"] == max(scores)
    assert scores[best] > min(scores), "the lowest one is another version"
    _, kept = Checkpoints(folder / "checkpoints", 2).load_best()
    assert kept == max(scores)
    assert sweep_score(folder) == -summary["final"]["right"]


def test_metrics_are_in_every_evaluated_line_and_in_the_summary(folder):
    summary, written = json.loads((folder / "summary.json").read_text()), lines(folder)
    for line in written:
        assert line["accuracy"] == line["top_tokens"] <= line["right"]  # the first of all outputs
    assert written[-1]["accuracy"] > 0
    assert [line["version"] for line in written if "sample_length" in line] == [0, 6]
    assert written[-1]["sample_length"] == len(written[-1]["sample"])
    final = {name: written[-1][name] for name in summary["final"]}
    assert summary["final"] == final
    assert list(final) == ["version", "right", "nats", "accuracy", "top_tokens", "sample_length"]


def test_the_task_has_the_fields_that_were_typed(folder):
    options = compose.of_run(folder)
    assert options.task.arguments == {"length": 10}
    assert "accuracy" in (folder / "model" / "README.md").read_text()


def problems(tmp_path: Path, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.load([f"run_dir={tmp_path}", *words])
    return caught.value.problems


def test_a_class_that_is_not_a_task_or_not_trusted_is_refused(tmp_path):
    (problem,) = problems(tmp_path, *TASK)
    assert "add trusted_packages=[support]" in problem
    (problem,) = problems(
        tmp_path, "task=custom", "task._target_=support.labels_task.TopTokens", TRUST
    )
    assert problem.endswith("must inherit from fedgpt.tasks.base.Task")
    (problem,) = problems(tmp_path, "task=custom")
    assert problem.startswith("task._target_ is not set")
    (problem,) = problems(tmp_path, *TASK, TRUST, "task.arguments={lenght: 3}")
    assert "lenght=3: the options of DocumentLabel are labels, length" in problem


def test_wrong_metrics_are_refused(tmp_path):
    (problem,) = problems(tmp_path, "metrics=[acuracy]")
    assert problem == (
        "metrics=[acuracy]: allowed are accuracy, or {_target_:package.module.Class}; did you mean"
        " 'accuracy'?"
    )
    (problem,) = problems(tmp_path, "metrics=[3]")
    assert problem.startswith("metrics=[3]: allowed are accuracy, or")
    (problem,) = problems(tmp_path, "metrics=[accuracy,accuracy]")
    assert problem == "metrics=accuracy: stands twice in the list; leave one out"
    same = "{_target_:fedgpt.evaluate.metrics.accuracy.Accuracy}"
    (problem,) = problems(tmp_path, f"metrics=[accuracy,{same}]")
    assert "there is a metric of the name 'accuracy' already" in problem
    advises(problem, "leave one of them out, or give it another name")
    other = "{_target_:support.labels_task.TopTokens,k:1}"
    for followed in (f"metrics=[{same}]", f"metrics=[accuracy,{other}]"):
        compose.load([f"run_dir={tmp_path}", followed, *([TRUST] if other in followed else [])])
    (problem,) = problems(tmp_path, "metrics=[{_target_:support.labels_task.DocumentLabel}]", TRUST)
    base = "fedgpt.evaluate.metrics.base"
    assert problem.endswith(f"must inherit from {base}.BatchMetric or {base}.SampleMetric")


def test_privacy_by_example_is_refused_where_its_accounting_does_not_fit(tmp_path):
    words = ("privacy=example", "privacy.target_epsilon=8")
    (problem,) = problems(tmp_path, *TASK, TRUST, *words)
    assert problem.startswith("privacy=example: its accounting counts blocks")
    assert "task=custom (DocumentLabel)" in problem
    compose.load([f"run_dir={tmp_path}", "task=lm", *words])


def test_a_label_that_the_task_does_not_know_is_an_error():
    with pytest.raises(ValueError, match="not in"):
        list(DocumentLabel().examples(np.arange(5), "carol", 8))


def test_held_out_text_that_the_task_cannot_use_is_refused_before_the_run(tmp_path):
    words = [*tiny_run(tmp_path), *TASK, "task.arguments={labels: [ann]}", TRUST]
    with pytest.raises(ConfigError) as caught:
        run_here(*words)
    (problem,) = caught.value.problems
    assert problem.startswith("task=custom: DocumentLabel refused the held-out text (")
    assert problem.endswith("; change task.arguments, or raise corpus.held_out")
    assert not (tmp_path / "run").exists()
    compose.load([*words[:-2], "task.arguments={labels: [ann, bob]}", TRUST])


def test_rollback_follows_the_direction_of_the_score(tmp_path):
    options = RunOptions(evaluate=EvaluateOptions(rollback=0.1))
    state = ServerState(np.zeros(3, np.float32))
    snapshot = Snapshot(state, RunIdentity("run"), VersionLine({}))
    best = BestWeights(
        options, Checkpoints(tmp_path, 1), snapshot, Score("right", higher_is_better=True)
    )
    states = [ServerState(np.full(3, v, np.float32), v) for v in range(5)]
    values = (0.5, 0.8, 0.73, 0.71, float("nan"))
    continued = [best.decide(*each)[0].params[0] for each in zip(states, values, strict=True)]
    assert continued == [0, 1, 2, 1, 1], "0.72 is a tenth below the best"
    for state, value in zip(states, values, strict=True):
        best.keep({"version": state.version, "right": value}, state.params)
    params, value = Checkpoints(tmp_path, 1).load_best()
    assert value == 0.8 and params[0] == 1
