"""Options that are numbers: each has ends, and what is beyond them is refused when it is typed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advice import advises
from support.refused import problems

from fedgpt.config import compose
from fedgpt.config.choices import groups, read_choice
from fedgpt.core import device
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import options_of
from fedgpt.core.targets import load_class

NUMBERS = [key for key, one in OPTIONS.items() if {int, float, list[float]} & {*one.kinds}]
# the classes of the group, not the option itself, know what they allow
OF_CLASSES = {"partition.clients", "update.block", "update.density"}
LISTS = {"fleet.step_seconds", "fleet.window"}


def words(text: str) -> list[str]:
    """Every option that is a number, set to `text`."""
    return [f"{key}=[{text}]" if key in LISTS else f"{key}={text}" for key in NUMBERS]


def test_a_number_beyond_every_end_is_refused_for_every_option_at_once():
    found = problems(*words(str(2**64)))
    named = {key for key in NUMBERS if any(p.startswith(f"{key}=") for p in found)}
    assert set(NUMBERS) - named <= OF_CLASSES


@pytest.mark.parametrize(
    "value",
    [10**400, 1e308, -(10**400), -1e308, float("inf")],
    ids=["10**400", "1e308", "-10**400", "-1e308", "inf"],
)
@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in OF_CLASSES | LISTS])
def test_every_number_has_an_upper_and_a_lower_end(key, value):
    problem = OPTIONS[key].problem(value)
    if key == "tokenizer.vocab_size" and value < 0:  # its lower end depends on the tokenizer
        [problem] = problems(f"{key}=-1")
    assert problem.startswith(f"{key}=") and len(problem) < 250


@pytest.mark.parametrize("value", [1e-320, 5e-324, 1e-30])
@pytest.mark.parametrize("key", [key for key in NUMBERS if float in OPTIONS[key].kinds])
def test_numbers_that_float32_takes_for_zero_are_refused(key, value):
    if key not in OF_CLASSES | {"privacy.delta"}:  # a delta is not a factor: it is only compared
        assert "must be 0, or at least 1e-12" in OPTIONS[key].problem(value)


@pytest.mark.parametrize("name", [name for name in groups()["strategy"] if name != "custom"])
def test_the_numbers_of_every_strategy_have_ends(name):
    target = str(read_choice("strategy", name).sets["strategy._target_"])
    if not target.startswith("fedgpt."):
        return
    for one in options_of(load_class("strategy", target, ("fedgpt.aggregate",)), "strategy"):
        if {int, float} & {*one.kinds}:
            assert one.problem(10**400) and one.problem(float("nan")) and one.problem(-(10**400))


@settings(max_examples=6, deadline=None)
@given(st.integers().map(str) | st.floats().map(str) | st.sampled_from(["1" + "0" * 5000, "1e999"]))
def test_any_number_of_any_option_is_valid_or_a_named_problem(text):
    try:
        assert isinstance(compose.load(words(text)), RunOptions)
    except ConfigError as error:
        assert all(any(group in p for group in (*groups(), *NUMBERS)) for p in error.problems)
        assert all("\n" not in problem for problem in error.problems)


@pytest.mark.parametrize(
    "typed, part",
    [
        ("runtime.workers=1000000", "runtime.workers=1000000: must be at most 4096"),
        ("partition.clients=10000000", "partition.clients=10000000: must be at most 1000000"),
        ("rounds=1000000000000000000", "rounds=1000000000000000000: must be at most 1000000000"),
        ("model.n_layer=1000000000000", "model.n_layer=1000000000000: must be at most 10000"),
        ("pace.deadline=1e12", "pace.deadline=1e12: must be at most 1000000000.0"),
        ("local.lr=1e-320", "local.lr=1e-320: must be 0, or at least 1e-12"),
        ("fleet.window=[inf,1]", "fleet.window=[inf,1]: must be [seconds available"),
        ("fleet.window=[1e400,1_0]", "fleet.window=[1e400,1_0]: must be [seconds available"),
        ("fleet.window=[1_0,2]", "fleet.window=[1_0,2]: is modelled by clock=virtual only"),
        ("fleet.window=[2, -1.50]", "fleet.window=[2, -1.50]: must be [seconds available"),
        ("fleet.window=[1," + "9" * 300 + "]", "fleet.window=[1,99999999999999999999... (300 digi"),
        ("seed=" + "9" * 5000, "a number of 5,005 characters; type fewer"),
        ("model.trainable=[" + "9" * 5000 + "]", "selects no parameter of this model"),
        (f"local.lr={10**400}", "is too large for a number with a fraction"),
        ("seed=range(0,1000000000000)", "has more than 10,000 values"),
    ],
)
def test_a_number_that_cannot_work_is_named(typed, part):
    assert any(part in problem for problem in problems(typed)), problems(typed)


@pytest.mark.parametrize("digits", [256, 3000, 4500])
@pytest.mark.parametrize("before", ["rounds=", "rounds=-", "rounds=1.", "local.lr=7.", "seed=1,"])
def test_a_number_of_thousands_of_digits_is_not_shown_as_a_whole(before, digits):
    for problem in problems(before + "7" * digits):
        assert len(problem) < 400, problem


@pytest.mark.parametrize("key", [key for key in NUMBERS if int in OPTIONS[key].kinds])
def test_a_whole_number_is_allowed_up_to_its_end_and_refused_above_it(key):
    if key == "update.block":  # its end is a matter of the codec
        assert "update.block" in problems("update=int8", f"{key}={2**63}")[0]
        return
    one = OPTIONS[key]
    low, high = 1_000, 2**63  # allowed, if no other option is considered; refused
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if one.problem(middle) else (middle, high)
    assert one.problem(high).startswith(f"{key}={high}: must be ")
    assert str(low) in one.problem(high), "the end is named"


def test_a_micro_batch_that_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("fedgpt.config.checks.memory", lambda: 25 * 10**9)
    monkeypatch.setattr("fedgpt.config.checks.may_have_gpu", lambda: True)
    huge = ["local.batch_size=1000000"]
    compose.load(huge)  # the memory of a GPU is not known without torch
    compose.load([*huge, "privacy=example"])  # whose micro-batches are smaller
    [problem] = problems(*huge, "runtime.device=cpu")
    assert problem == (
        "local.batch_size=1000000: a micro-batch of so many sequences of model.block_size=64 tokens"
        " needs at least 1,573.0 GB, and this machine has 25.0 GB; lower it to 7946 or less, and"
        " raise local.accumulate instead"
    )
    advises(problem, "lower it to 7946 or less, and raise local.accumulate instead")
    monkeypatch.setattr("fedgpt.config.checks.may_have_gpu", lambda: False)
    assert problems(*huge) == [problem]
    compose.load(["local.batch_size=7946", "local.accumulate=126"])
    [problem] = problems("model.block_size=10000000", "model.n_layer=64", "local.batch_size=2")
    advises(problem, "lower model.block_size")
    compose.load(["model.block_size=64", "model.n_layer=64", "local.batch_size=2"])


def test_patterns_of_parameters_are_not_looked_for_in_a_model_without_end():
    [problem] = problems(f"model.n_layer={10**18}", "model.trainable=[transformer.h.9.*]")
    assert problem == f"model.n_layer={10**18}: must be at most 10000"


def test_a_model_that_does_not_fit_into_memory_is_refused_before_anything_is_allocated(monkeypatch):
    [problem] = problems("model.n_embd=1000000", "model.n_head=100", "model.n_layer=1")
    assert problem.startswith("model.n_embd=1000000 and model.n_layer=1: 1.2e+13 parameters need")
    assert problem.endswith("lower one of them")
    compose.load(["model=gpt2"])
    monkeypatch.setattr("fedgpt.config.checks.memory", lambda: 10**9)
    assert problems(f"tokenizer.vocab_size={10**10}") == [
        f"tokenizer.vocab_size={10**10}: must be at most 1000000"
    ]
    [problem] = problems("model=gpt2")
    assert "need at least 1.1 GB, and this machine has 1.0 GB" in problem
    monkeypatch.setattr("fedgpt.config.checks.memory", lambda: 0)  # a system that does not say
    compose.load(["model=gpt2"])


def test_the_memory_of_this_machine_is_known():
    assert device.memory() > 2**28
