"""Nothing that is typed is without effect in silence; each remedy of such a message is followed."""

from __future__ import annotations

import pytest
from support.refused import problems
from support.third_party import TRUSTED

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError

PRIVATE = ["privacy=client", "privacy.noise_multiplier=5"]
CHOOSE = "choose privacy=example, client or local"
CLIENT = {"choose privacy=client": PRIVATE}
# what is typed -> what the message advises, and the words that do so
UNUSED_REMEDIES = {
    "model.rope_theta=500": {"add model.positions=rotary": ["model.positions=rotary"]},
    "model.partial_rotary_factor=0.5": {"add model.positions=rotary": ["model.positions=rotary"]},
    "model.gelu=tanh": {"add model.mlp=gelu": ["model.mlp=gelu"]},
    "update.decay=0.5": {
        "add update.error_feedback=true and a codec, such as update=int8": [
            "update=int8",
            "update.error_feedback=true",
        ]
    },
    "evaluate.sample_tokens=5": {"add evaluate.samples=2": ["evaluate.samples=2"]},
    "evaluate.prompt=x": {"add evaluate.samples=2": ["evaluate.samples=2"]},
    "validate.rest=5": {"add validate.strikes=3": ["validate.strikes=3"]},
    "validate.norm=5": {"choose privacy=example or local": ["privacy=local"]},
    "pace.minimum=3": {"choose privacy=example or local": ["privacy=local"]},
    "privacy.clip=2": {CHOOSE: PRIVATE},
    "privacy.engine=opacus": {"choose privacy=example": ["privacy=example"]},
    "privacy.adaptive=true": CLIENT,
    "privacy.bands=1": CLIENT,
    "privacy.separation=2": CLIENT,
    "privacy.single=true": CLIENT,
    "privacy.participations=2": {CHOOSE: PRIVATE},
    "privacy.rng=seeded": {CHOOSE: PRIVATE},
    "partition.alpha=0.1": {"add partition=dirichlet": ["partition=dirichlet"]},
    "attack.strength=3": {
        "add attack=sign_flip or attack=scale or attack=gaussian": [
            "attack=scale",
            "attack.clients=1",
        ]
    },
    "tokenizer.vocab_size=300": {"add tokenizer=bpe": ["tokenizer=bpe"]},
    "corpus.text_field=body": {
        "add corpus=files or corpus=site": ["corpus=files", "corpus.path=."]
    },
    "corpus.label_field=topic": {
        "add partition=dirichlet if corpus.path has records": [
            *("partition=dirichlet", "corpus=files", "corpus.path=."),
        ]
    },
    "fleet.median=2": {"add fleet=lognormal": ["fleet=lognormal", "clock=virtual"]},
    "pace.minimum=2": {"choose pace=cohort": ["pace=cohort"]},
    "pace.clients=4": {"add pace.rate=null": ["pace.rate=null"]},
    "rounds=5": {"add tokens=0": ["tokens=0"]},
    "runtime.workers=2": {
        "choose runtime=pool or runtime=ray": ["runtime=pool", "runtime.threads=1"]
    },
    TRUSTED: {
        "name one of these with `_target_`": [
            "partition=custom",
            "partition._target_=outsider.Alternate",
        ]
    },
}
# an option, or a group -> what else is typed, so that the option has no effect
WITHOUT = {
    "evaluate": ["evaluate.samples=0"],
    "validate.rest": ["validate.strikes=0"],
    "validate.norm": PRIVATE,
    "corpus.label_field": ["corpus=files", "corpus.path=."],
    "tokenizer": ["tokenizer=bytes"],
    "runtime": ["runtime=inprocess", "runtime.threads=1"],
    "pace.minimum=2": ["pace=buffer", "strategy=fedbuff"],
    "pace.minimum=3": PRIVATE,
    "rounds": ["tokens=100000"],
    "pace.clients": ["pace.rate=0.5"],
    "model.rope": ["model.positions=learned"],
    "model.partial": ["model.positions=learned"],
    "model.gelu": ["model.mlp=swiglu"],
}


@pytest.mark.parametrize("typed", UNUSED_REMEDIES)
def test_an_option_without_effect_is_reported_and_the_remedy_helps(typed):
    without = [word for key in WITHOUT if typed.startswith(key) for word in WITHOUT[key]]
    [problem] = problems(typed, *without)
    assert problem.startswith(f"{typed}: has no effect with ")
    for remedy, words in UNUSED_REMEDIES[typed].items():
        assert problem.endswith(f"; {remedy}, or leave it out")
        compose.load([typed, *words])
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
