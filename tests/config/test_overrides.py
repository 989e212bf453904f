"""Overrides: errors as typed and once for each mistake, and values that need no more quotes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.refused import problems

from fedgpt.config import compose
from fedgpt.config.texts import quoted


@pytest.mark.parametrize(
    "typed, message",
    [
        (
            "tokens=1e6",
            "tokens=1e6: must be a whole number, at least 0 (0 = end after `rounds`); type 1000000",
        ),
        ("tokens=1.5", "tokens=1.5: must be a whole number, at least 0 (0 = end after `rounds`)"),
        ("rounds=true", "rounds=true: must be a whole number, at least 1"),
        ("pace.goal=x", "pace.goal=x: must be a whole number or null, at least 1"),
        ("evaluate.samples=null", "evaluate.samples=null: must be a whole number, at least 0"),
        ("fleet.step_seconds=1", "fleet.step_seconds=1: must be a list of numbers, such as [1,2]"),
        ("trusted_packages=mine", "trusted_packages=mine: must be a list of texts, such as [a,b]"),
        ("local.lr=fast", "local.lr=fast: must be a number, above 0 and at most 1"),
        ("model.bias=perhaps", "model.bias=perhaps: must be true or false"),
        ("local.weight_decay=inf", "local.weight_decay=inf: must be a finite number, at least 0"),
        ("pace.deadline=nan", "pace.deadline=nan: must be a finite number, above 0 seconds"),
        (
            "rounds==5",
            "rounds==5: not of the form key=value; a text with special characters needs quotes",
        ),
        (
            "update.compress=int8",
            "update.compress=int8: is set by the choice of its group; type update=int8",
        ),
        ("local.lr=1e400", "local.lr=1e400: must be a finite number, above 0 and at most 1"),
        ("local.lr=1e-400", "local.lr=1e-400: must be above 0 and at most 1"),
        ("local.lr=2", "local.lr=2: must be above 0 and at most 1"),
        ("local.lr=2.50", "local.lr=2.50: must be above 0 and at most 1"),
        ("+name=foo", "+name=foo: a plus adds a name that is not there yet; leave out the plus"),
        ("+local.lr=0.1", "+local.lr=0.1: a plus adds a name"),
        ("+model=nano", "+model=nano: a plus adds a name"),
        ("++model=nano", "++model=nano: a plus adds a name"),
        ("+strategy.eta=1", "+strategy.eta=1: a plus adds a name"),
        ("~local.lr", "~local.lr: an option can be set, not deleted"),
        ("run_dir=", "run_dir=: must be a folder"),
        ("name=a/b", "name=a/b: must be a name without a slash"),
        ("lr=0.1", "lr=0.1: no option 'lr'; did you mean 'local.lr'"),
        (
            "partition.alpha=0.1",
            "partition.alpha=0.1: has no effect with partition=natural; add partition=dirichlet,",
        ),
        (
            "attack.strength=3",
            "attack.strength=3: has no effect with attack=none; add attack=sign_flip or",
        ),
    ],
)
def test_an_error_shows_the_value_as_typed_and_what_is_allowed(typed, message):
    [problem] = problems(typed)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "typed, only",
    [
        (["privacy=clients", "privacy.target_epsilon=3"], "privacy=clients: choose from"),
        (["corpus=file", "corpus.path=/x"], "corpus=file: choose from"),
        (["pace=bufer", "strategy=fedbuff"], "pace=bufer: choose from"),
        (
            ["tokenizer=bytes", "tokenizer.vocab_size=300"],
            "tokenizer.vocab_size=300: has no effect with tokenizer=bytes",
        ),
        (
            ["corpus=stdlib", "corpus.path=/tmp"],
            "corpus.path=/tmp: has no effect with corpus=stdlib; add corpus=files, or leave it out",
        ),
        (
            ["update=topk", "update.block=64"],
            "update.block=64: has no effect with update=topk; add update=int8 or update=int4 or",
        ),
        (["trusted_packages=['']"], "trusted_packages=['']: must be names of packages, such as"),
        (["tokens=100000", "rounds=5"], "rounds=5: has no effect with tokens=100000; add tokens=0"),
    ],
)
def test_one_mistake_is_reported_once(typed, only):
    [problem] = problems(*typed)
    assert problem.startswith(only)


@pytest.mark.parametrize(
    "value",
    [
        "~/my notes",
        "/tmp/ünïcödé 日本",
        "/tmp/notes (1)",
        "/tmp/it's",
        "/tmp/a=b",
        '/tmp/a "b"',
        "/tmp/a,b",
        "/tmp/plain",
    ],
)
def test_paths_and_prompts_need_no_quotes_but_those_of_the_shell(value):
    options = compose.load(
        ["corpus=files", f"corpus.path={value}", f"run_dir={value}", f"evaluate.prompt={value}"]
    )
    assert (
        options.corpus.path == options.run_dir == str(Path(value).expanduser())
        and options.evaluate.prompt == value
    )
    assert compose.load([quoted(f"evaluate.prompt={value}")]).evaluate.prompt == value, (
        "with the quotes that Hydra gets"
    )


def test_a_name_is_free_text_and_a_comma_in_a_choice_is_a_sweep():
    assert compose.load(["name=münchen 2"]).name == "münchen 2"
    [problem] = problems("clock=real,virtual")
    assert problem.startswith("clock=real,virtual: is a sweep, which is typed with -m")


def test_a_sweep_over_texts_and_numbers_is_accepted():
    compose.check_sweep(["evaluate.prompt=a,b", "local.lr=1e-4,1e-3"])
