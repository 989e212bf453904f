"""Tasks, metrics, corpora and partitions of a user that break their interface, in complete runs."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.advice import advises
from support.here import run_here, tiny_run

from fedgpt import open_run
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.score import LANGUAGE, RESERVED, Score, Scoring, number
from fedgpt.evaluate.metrics.base import BatchMetric, SampleMetric, make_metrics
from fedgpt.server.metrics_line import FIRST
from fedgpt.tasks.base import Task
from fedgpt.tasks.lm import LanguageModel

TRUST = f"trusted_packages=[{__name__.partition('.')[0]}]"
VIRTUAL = ["clock=virtual", "fleet=constant"]
RUNS = {
    "rounds": ["evaluate.samples=2", "evaluate.sample_tokens=4", "evaluate.rollback=0.1"],
    "buffer": ["pace=buffer", "strategy=fedbuff", "pace.clients=2", "update=topk", *VIRTUAL],
    "client": ["privacy=client", "pace.clients=2", "privacy.noise_multiplier=3"],
    "example": ["privacy=example", "privacy.noise_multiplier=3"],
}
PRIVATE = ["privacy.delta=0.004", "privacy.target_epsilon=null", "runtime.watchdog=0"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def own(kind: type, group: str = "task") -> list[str]:
    return [f"{group}=custom", f"{group}._target_={__name__}.{kind.__name__}", TRUST]


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose.load(words)
    (problem,) = caught.value.problems
    return problem


# ---- names


def test_every_field_of_a_line_that_is_no_score_is_reserved(tmp_path):
    """Of runs with both pacings, both clocks, samples, a codec and private ones."""
    found: set[str] = set()
    for name, words in RUNS.items():
        private = PRIVATE if name in ("client", "example") else []
        run_here(*tiny_run(tmp_path / name), *words, *private)
        found |= {field for line in lines(tmp_path / name / "run") for field in line}
    assert found - {*LANGUAGE.names} == RESERVED
    assert FIRST.keys() < RESERVED


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_no_metric_and_no_score_has_the_name_of_another_field(name, monkeypatch):
    monkeypatch.setattr(Named, "name", name)
    metric = f"metrics=[{{_target_:{__name__}.Named}}]"
    assert make_metrics_problem() == (
        f"metrics=[{__name__}.Named]: Named is named {name!r}, as a field of every line of"
        " metrics.jsonl; give it another name"
    )
    advises(make_metrics_problem(), "metrics.jsonl; give it another name")
    if name in ("version", "epsilon"):
        assert f"is named {name!r}" in refused(metric, TRUST)
    scoring = Scoring(Score("loss"), ("loss", name))
    assert f"one of its scores is named {name!r}" in scoring.problem
    assert f"one of its scores is named {name!r}" in Scoring(Score(name), (name,)).problem
    monkeypatch.setattr(Named, "name", "another")
    make_metrics([{"_target_": f"{__name__}.Named"}], [__name__.partition(".")[0]], LANGUAGE)


def test_a_scoring_is_accepted_after_what_its_problem_advises():
    advises(Scoring(Score("loss"), ("accuracy",)).problem, "add it to them")
    assert not Scoring(Score("loss"), ("accuracy", "loss")).problem
    twice = Scoring(Score("loss"), ("loss", "accuracy", "accuracy")).problem
    advises(twice, "two of its scores are named 'accuracy'; give one another name")
    assert not Scoring(Score("loss"), ("loss", "accuracy", "other")).problem


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_the_name_of_a_metric_is_a_text(name, monkeypatch):
    monkeypatch.setattr(Named, "name", name)
    assert f"Named is named {name!r}; its name must be a text" in make_metrics_problem()


@dataclass(frozen=True)
class Named(BatchMetric):
    """A metric whose name the tests set."""

    name: ClassVar[Any] = "named"

    def tally(self, outputs, batch):
        return {"count": torch.tensor(1)}

    def value(self, totals):
        return totals["count"]


def make_metrics_problem() -> str:
    with pytest.raises(ConfigError) as caught:
        make_metrics([{"_target_": f"{__name__}.Named"}], [__name__.partition(".")[0]], LANGUAGE)
    (problem,) = caught.value.problems
    return problem


@dataclass(frozen=True)
class Scored(LanguageModel):
    """Text as in task=lm; its scores are what the tests set."""

    scoring: ClassVar[Any] = Scoring(Score("loss"), ("loss",))
    found: ClassVar[Any] = {"loss": 1.0}

    def scores(self, totals: Mapping[str, float]) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    "scoring, words",
    [
        (Scoring(Score("loss"), ("loss", "version")), "one of its scores is named 'version', as a"),
        (Scoring(Score("loss"), ("perplexity",)), "its score Score(name='loss', higher_is_better="),
        (Scoring(Score("loss"), ("loss", "loss")), "two of its scores are named 'loss'; give one"),
        (Scoring(Score("loss"), ("loss", "")), "one of its scores is named ''; its name must be"),
        (Scoring("loss", ("loss",)), "its score 'loss' is not among"),  # pyright: ignore
        (("loss",), "scoring raised AttributeError: 'tuple' object has no attribute 'problem'"),
    ],
)
def test_wrong_names_of_scores_are_refused_before_anything_is_prepared(scoring, words, monkeypatch):
    monkeypatch.setattr(Scored, "scoring", scoring)
    assert refused(*own(Scored)).startswith(f"task._target_={__name__}.Scored: {words}")


def test_the_interface_of_a_task_is_no_task():
    target = "task._target_=fedgpt.tasks.base.Task"
    assert refused("task=custom", target) == (
        f"{target}: must define examples, as fedgpt.tasks.base.Task says"
    )


# ---- scores


def test_only_the_scores_that_the_task_names_are_taken_and_they_are_numbers(tmp_path, monkeypatch):
    found = {"loss": torch.tensor(0.5), "version": 9, "epsilon": 0.1, "tokens": 1, "extra": 2.0}
    monkeypatch.setattr(Scored, "found", found)
    summary = run_here(*tiny_run(tmp_path), *own(Scored))
    assert summary["versions"] == 3 and summary["epsilon"] is None
    written = lines(tmp_path / "run")
    assert [line["version"] for line in written] == [0, 1, 2, 3]
    assert all(line["loss"] == 0.5 and "extra" not in line for line in written)
    assert written[-1]["tokens"] > 1


@pytest.mark.parametrize(
    "found, words",
    [
        ({"perplexity": 1.0}, "scores returned no 'loss', which is among the names of its scoring"),
        ({"loss": "low"}, "its 'loss' is 'low'; it must be one number"),
        ({"loss": None}, "its 'loss' is None; it must be one number"),
        ({"loss": torch.zeros(2)}, "its 'loss' is tensor([0., 0.]); it must be one number"),
        (None, "scores raised TypeError: argument of type 'NoneType' is not iterable"),
        (KeyError("nats"), "scores raised KeyError: 'nats' (test_own_classes.py, line "),
    ],
)
def test_wrong_scores_end_a_run_at_its_beginning(tmp_path, monkeypatch, found, words):
    monkeypatch.setattr(Scored, "found", found)
    words_of_run = [word for word in tiny_run(tmp_path) if not word.startswith("rounds=")]
    with pytest.raises(FedGPTError) as caught:
        run_here(*words_of_run, *own(Scored), "rounds=200", "evaluate.every=0")
    assert f"task._target_={__name__}.Scored: {words}" in str(caught.value)
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "version" for line in events) < 150
    assert isinstance(caught.value.__cause__, Exception) or "returned no" in words


def test_values_that_become_numbers():
    assert [number(v) for v in (2, 0.5, True, np.float32(1), torch.tensor([3.0]))] == [
        2,
        0.5,
        1,
        1,
        3,
    ]
    assert type(number(torch.tensor(1))) is float and type(number(True)) is float
    for wrong in ("1", b"1", None, [1.0], torch.zeros(2), 1j):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            number(wrong)


@dataclass(frozen=True)
class Failing(BatchMetric):
    """A metric that fails where the tests say."""

    name: ClassVar[str] = "failing"
    at: str = "value"

    def tally(self, outputs, batch):
        if self.at == "tally":
            raise RuntimeError("no outputs")
        return None if self.at == "no tally" else {"count": torch.tensor(1)}

    def value(self, totals):
        if self.at == "value":
            raise KeyError("all")
        return self.at


@dataclass(frozen=True)
class FailingSample(SampleMetric):
    """A metric of samples that returns no number."""

    name: ClassVar[str] = "failing_sample"

    def value(self, sample) -> Any:
        return sample.written


@pytest.mark.parametrize(
    "metric, words",
    [
        ("Failing,at:tally", "Failing: tally raised RuntimeError: no outputs (test_own"),
        ("Failing,at:no tally", "Failing: tally raised AttributeError: 'NoneType' object"),
        ("Failing,at:value", "Failing: value raised KeyError: 'all' (test_own"),
        ("Failing,at:text", "Failing: its 'failing' is 'text'; it must be one number"),
        ("FailingSample", "FailingSample: its 'failing_sample' is "),
    ],
)
def test_a_metric_that_fails_is_a_message(tmp_path, metric, words):
    options = [word for word in tiny_run(tmp_path) if not word.startswith("evaluate.samples")]
    more = ["evaluate.samples=1", "evaluate.sample_tokens=4", "rounds=1"]
    options = [word for word in options if not word.startswith("rounds=")]
    with pytest.raises(FedGPTError) as caught:
        run_here(*options, *more, f"metrics=[{{_target_:{__name__}.{metric}}}]", TRUST)
    assert f"metrics._target_={__name__}.{words}" in str(caught.value)


@dataclass(frozen=True)
class Careless(Task):
    """A task whose held-out examples are what the tests set."""

    given: ClassVar[Any] = None

    def examples(self, tokens, label, block_size):
        yield tokens[:1], tokens[:1]

    def held_out(self, text, block_size) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given

    def problems(self, options):
        if self.given == "problems":
            raise KeyError("labels")
        return ()


@pytest.mark.parametrize(
    "given, words",
    [
        (None, "held_out returned None; it must return fedgpt.data.examples.Examples"),
        (KeyError("ann"), "held_out raised KeyError: 'ann' (test_own_classes.py, line "),
    ],
)
def test_held_out_text_that_is_not_made_refuses_the_run(tmp_path, monkeypatch, given, words):
    monkeypatch.setattr(Careless, "given", given)
    with pytest.raises(ConfigError) as caught:
        run_here(*tiny_run(tmp_path), *own(Careless))
    assert caught.value.problems[0].startswith(f"task._target_={__name__}.Careless: {words}")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_problems_that_raise_are_a_problem(monkeypatch):
    monkeypatch.setattr(Careless, "given", "problems")
    assert refused(*own(Careless)).startswith(
        f"task._target_={__name__}.Careless: problems raised KeyError: 'labels' ("
    )


# ---- a run whose classes are gone


def test_a_run_with_own_classes_is_read_without_them_and_resumed_with_them(tmp_path, monkeypatch):
    module = tmp_path / "package" / "departed.py"
    module.parent.mkdir()
    module.write_text(
        "from dataclasses import dataclass\n"
        "from fedgpt.data.corpora.base import Corpus, Document\n"
        "from fedgpt.evaluate.metrics.accuracy import Accuracy\n"
        "from fedgpt.report.trackers.csv import CsvTracker as Mine\n"
        "from fedgpt.tasks.lm import LanguageModel as Task\n"
        "from fedgpt.aggregate.fedavg import FedAvg as Rule\n"
        "@dataclass(frozen=True)\n"
        "class Pages(Corpus):\n"
        "    def documents(self):\n"
        "        for n in range(24):\n"
        "            yield Document('ab'[n % 2], str(n), f'page {n} of the river. ' * 9)\n"
    )
    monkeypatch.syspath_prepend(module.parent)
    words = [word for word in tiny_run(tmp_path) if not word.startswith("corpus")]
    run_here(
        *words,
        "corpus=custom",
        "corpus.public=0.2",
        "corpus.held_out=0.2",
        "corpus._target_=departed.Pages",
        "task=custom",
        "task._target_=departed.Task",
        "strategy._target_=departed.Rule",
        "track=[{_target_:departed.Mine}]",
        "metrics=[{_target_:departed.Accuracy}]",
        "trusted_packages=[departed]",
    )
    module.unlink()
    monkeypatch.delitem(sys.modules, "departed")
    importlib.invalidate_caches()
    run = open_run(tmp_path / "run")
    text = run.generate("page", tokens=4, seed=1)
    for file in (tmp_path / "run" / "model").iterdir():  # as of a run that is not finished
        file.unlink()
    assert open_run(tmp_path / "run").generate("page", tokens=4, seed=1) == text
    with pytest.raises(ConfigError, match="departed"):
        compose.of_run(tmp_path / "run")


def test_a_damaged_value_is_found_when_a_run_is_read(tmp_path):
    text = compose.to_yaml(compose.load([f"run_dir={tmp_path}"]))
    (tmp_path / "config.yaml").write_text(text.replace("n_layer: 4", "n_layer: -1"))
    assert "n_layer: -1" in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"model\.n_layer=-1"):
        compose.of_run(tmp_path, reading=True)
