"""Nothing that is typed is without effect in silence; each remedy of such a message is followed."""

from __future__ import annotations

import pytest
from support.refused import problems
from support.third_party import TRUSTED

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError

PRIVATE = ["privacy=client", "privacy.noise_multiplier=5"]
# what is typed -> the problem, and what it advises to add
UNUSED = {
    "update.decay=0.5": ["update=int8", "update.error_feedback=true"],
    "evaluate.sample_tokens=5": ["evaluate.samples=2"],
    "evaluate.prompt=x": ["evaluate.samples=2"],
    "validate.rest=5": ["validate.strikes=3"],
    "validate.norm=5": ["privacy=example"],
    "privacy.clip=2": PRIVATE,
    "privacy.engine=opacus": ["privacy=example"],
    "privacy.adaptive=true": PRIVATE,
    "privacy.bands=1": PRIVATE,
    "privacy.separation=2": PRIVATE,
    "privacy.single=true": PRIVATE,
    "privacy.participations=2": PRIVATE,
    "privacy.rng=seeded": PRIVATE,
    "partition.alpha=0.1": ["partition=dirichlet"],
    "attack.strength=3": ["attack=scale", "attack.clients=1"],
    "tokenizer.vocab_size=300": ["tokenizer=bpe"],
    "corpus.text_field=body": ["corpus=files", "corpus.path=."],
    "corpus.label_field=topic": ["partition=dirichlet", "corpus=files", "corpus.path=."],
    "fleet.median=2": ["fleet=lognormal", "clock=virtual"],
    "pace.minimum=2": ["pace=cohort"],
    "pace.clients=4": ["pace.rate=null"],
    "runtime.workers=2": ["runtime=pool", "runtime.threads=1"],
}
# an option, or a group -> what else is typed, so that the option has no effect
WITHOUT = {
    "evaluate": ["evaluate.samples=0"],
    "validate.rest": ["validate.strikes=0"],
    "validate.norm": PRIVATE,
    "corpus.label_field": ["corpus=files", "corpus.path=."],
    "tokenizer": ["tokenizer=bytes"],
    "runtime": ["runtime=inprocess", "runtime.threads=1"],
    "pace.minimum": ["pace=buffer", "strategy=fedbuff"],
    "pace.clients": ["pace.rate=0.5"],
}


@pytest.mark.parametrize("typed", UNUSED)
def test_an_option_without_effect_is_reported_and_the_remedy_helps(typed):
    without = [word for key in WITHOUT if typed.startswith(key) for word in WITHOUT[key]]
    [problem] = problems(typed, *without)
    assert problem.startswith(f"{typed}: has no effect with ") and "or leave it out" in problem
    for word in UNUSED[typed][:1]:
        assert word.partition("=")[0] in problem
    compose.load([typed, *UNUSED[typed]])
    compose.load(without)


def test_the_smallest_cohort_is_not_compared_under_client_privacy():
    private = [*PRIVATE, "pace.minimum=2"]
    [problem] = problems(*private)
    assert problem == (
        "pace.minimum=2: has no effect with privacy=client; choose privacy=example or local, or"
        " leave it out"
    )
    for unit in ("example", "local"):
        compose.load([f"privacy={unit}", *private[1:]])


@pytest.mark.parametrize("words", [[], ["track=[csv]"], ["strategy=median"]], ids=str)
def test_a_trusted_package_without_a_class_of_it_is_reported(words):
    [problem] = problems(TRUSTED, *words)
    assert problem.startswith(f"{TRUSTED}: has no effect with classes of other packages only;")
    compose.load([TRUSTED, *words, "partition=custom", "partition._target_=outsider.Alternate"])


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
