"""Nothing that is typed is without effect in silence; each remedy of such a message is followed."""

from __future__ import annotations

import pytest
from support.refused import problems

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError

PRIVATE = ["privacy=client", "privacy.noise_multiplier=5"]
# what is typed -> the problem, and what it advises to add
UNUSED = {
    "update.decay=0.5": ["update=int8", "update.error_feedback=true"],
    "evaluate.sample_tokens=5": ["evaluate.samples=2"],
    "evaluate.prompt=x": ["evaluate.samples=2"],
    "validate.rest=5": ["validate.strikes=3"],
    "privacy.clip=2": PRIVATE,
    "privacy.participations=2": PRIVATE,
    "privacy.rng=seeded": PRIVATE,
    "partition.alpha=0.1": ["partition=dirichlet"],
    "attack.strength=3": ["attack=scale", "attack.clients=1"],
    "tokenizer.vocab_size=300": ["tokenizer=bpe"],
    "corpus.text_field=body": ["corpus=files", "corpus.path=."],
    "fleet.median=2": ["fleet=lognormal", "clock=virtual"],
}
WITHOUT = {
    "evaluate": "evaluate.samples=0",
    "validate": "validate.strikes=0",
    "tokenizer": "tokenizer=bytes",
}


@pytest.mark.parametrize("typed", UNUSED)
def test_an_option_without_effect_is_reported_and_the_remedy_helps(typed):
    without = [WITHOUT[group] for group in WITHOUT if typed.startswith(f"{group}.")]
    [problem] = problems(typed, *without)
    assert problem.startswith(f"{typed}: has no effect with ") and "or leave it out" in problem
    for word in UNUSED[typed][:1]:
        assert word.partition("=")[0] in problem
    compose.load([typed, *UNUSED[typed]])
    compose.load(without)


def test_a_sweep_is_checked_for_options_without_effect_in_all_of_its_jobs():
    with pytest.raises(ConfigError) as caught:
        compose.check_sweep(["partition.alpha=0.1,0.2", "seed=0,1"])
    [problem] = caught.value.problems
    assert problem.startswith("partition.alpha=0.1,0.2: has no effect with partition=natural")
    compose.check_sweep(["partition=iid,dirichlet", "partition.alpha=0.1,0.2"])


def test_a_word_that_a_later_one_replaces_is_reported(capsys):
    assert compose.load(["rounds=5", "seed=1", "rounds=6"]).rounds == 6
    assert capsys.readouterr().err == (
        "fedgpt: rounds=5 is replaced by rounds=6, which is typed later\n"
    )
    compose.load(["rounds=5", "rounds=5"])
    assert capsys.readouterr().err == ""
