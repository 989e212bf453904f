"""`fedgpt privacy plan` states the size of the noise, and the changes that it suggests lower it."""

from __future__ import annotations

import math
import re

import pytest
from support.advice import advises

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError
from fedgpt.model.shape import count_parameters
from fedgpt.report import privacy_plan

SHARDS, VOCABULARY = [2000] * 200, 257
EXAMPLE = ["privacy=example"]
CLIENT = ["privacy=client", "pace.clients=50"]
LOCAL = ["privacy=local"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Epsilons take seconds to compute, and these tests do not check them."""
    for name in ("_cost", "epsilon_of", "renyi_epsilon"):
        monkeypatch.setattr(privacy_plan, name, lambda *_: 1.0)


def plan_rows(*chosen: str) -> dict[str, str]:
    """The rows of the plan, by name."""
    text = privacy_plan.plan_text(
        compose.load(["rounds=20", "privacy.target_epsilon=2", *chosen]), SHARDS, VOCABULARY
    )
    return dict(re.findall(r"^ *(\S.*?)  (\S.*)$", text, re.M))


def ratio(rows: dict[str, str]) -> float:
    return float(rows["noise/clip"].partition(":")[0].replace(",", ""))


@pytest.mark.parametrize(
    ("chosen", "units", "words"),
    [
        (EXAMPLE, 8, "noise of one step, divided by the largest norm of a clipped gradient"),
        (CLIENT, 50, "noise of one release, divided by the largest norm of a clipped update"),
        # the update of one client may change to any other one, which is two clips away
        (LOCAL, 0.5, "noise of one update, divided by the largest norm of a clipped update"),
    ],
    ids=str,
)
def test_the_ratio_is_the_length_of_the_noise_in_clips(chosen, units, words):
    rows = plan_rows(*chosen, "privacy.target_epsilon=null", "privacy.noise_multiplier=1.5")
    parameters = count_parameters(compose.load([]).model, VOCABULARY)
    assert ratio(rows) == pytest.approx(1.5 * math.sqrt(parameters) / units, rel=0.01)
    assert (
        words in rows["noise/clip"]
        and f"fewer parameters (now {parameters:,})" in rows["lower with"]
    )


@pytest.mark.parametrize(
    ("chosen", "more", "words"),
    [
        (EXAMPLE, ["local.batch_size=16"], "larger batches (now 8), "),
        (CLIENT, ["pace.clients=100"], "more clients a round (now 50), "),
        (LOCAL, None, "fewer parameters"),
    ],
    ids=str,
)
def test_the_suggested_changes_lower_the_noise(chosen, more, words):
    before = plan_rows(*chosen)
    assert before["lower with"].startswith(words)
    for change in (more, ["model.n_layer=1"], ["privacy.target_epsilon=4"]):
        assert change is None or ratio(plan_rows(*chosen, *change)) < ratio(before), change


@pytest.mark.parametrize("chosen", [EXAMPLE, CLIENT, LOCAL], ids=str)
def test_without_a_unit_there_is_no_plan_and_with_each_that_is_advised_there_is(chosen):
    with pytest.raises(ConfigError) as refused:
        privacy_plan.refuse_no_privacy(compose.load([]))
    advises(refused.value, "choose privacy=example, client or local")
    privacy_plan.refuse_no_privacy(compose.load(chosen))
    assert plan_rows(*chosen)
