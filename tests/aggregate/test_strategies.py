"""Properties that every built-in strategy has; a new one is tested here as soon as it exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import MISSING, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from support.cohorts import d_of, every_strategy, ready, start, turn, updates

from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import Pacing, ServerState
from fedgpt.core.options.option import at_least, option, options_of, typed

CONF = Path(__file__).parents[2] / "conf" / "strategy"
ALL = every_strategy()
every = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
ORDERLESS = [c for c in ALL if "cohort" in c.paces or c().linear]
COMBINING = [c for c in ALL if not c().linear]
orderless = pytest.mark.parametrize("cls", ORDERLESS, ids=lambda cls: cls.__name__)
combining = pytest.mark.parametrize("cls", COMBINING, ids=lambda cls: cls.__name__)


def test_every_strategy_has_a_file_in_conf():
    names = {path.stem for path in CONF.glob("*.yaml")} - {"flower", "custom"}
    assert {cls().name for cls in ALL} == names and len(ALL) == len(names) == 18


@every
def test_a_step_moves_the_model_towards_a_unanimous_update(cls):
    strategy, state, base = cls(), start(), updates(1)[0]
    cohort = [replace(base, client=f"client{i}", tokens=i + 1) for i in range(5)]
    for _ in range(3):
        new = turn(strategy, cohort, state)
        moved = new.params - state.params
        assert (np.sign(moved) == -np.sign(base.delta)).all()
        state = new


@orderless
@given(order=st.permutations(range(7)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_arrival_changes_no_bit(cls, order):
    strategy, state, cohort = cls(), start(), updates(7)
    reference = turn(strategy, cohort, state)
    shuffled = turn(strategy, [cohort[i] for i in order], state)
    assert shuffled.params.tobytes() == reference.params.tobytes()
    assert {n: a.tobytes() for n, a in shuffled.memory.items()} == {
        n: a.tobytes() for n, a in reference.memory.items()
    }


@every
def test_negated_updates_move_the_model_the_other_way(cls):
    strategy, state = cls(), ServerState(np.zeros(40, np.float32))
    one = turn(strategy, updates(), state)
    two = turn(strategy, [replace(update, delta=-update.delta) for update in updates()], state)
    np.testing.assert_array_equal(one.params, -two.params)


@every
def test_a_zero_update_with_empty_memory_changes_nothing(cls):
    state = start()
    new = cls().step(np.zeros_like(state.params), state)
    assert new.params.tobytes() == state.params.tobytes()
    assert new.version == state.version + 1


@every
def test_zero_updates_change_nothing(cls):
    """A norm, distance or cosine of zero gives no NaN, and the memory stays usable."""
    zeros = [replace(update, delta=np.zeros_like(update.delta)) for update in updates()]
    state = start()
    new = turn(cls(), zeros, state)
    assert new.params.tobytes() == state.params.tobytes()
    after = turn(cls(), updates(), new)
    assert np.isfinite(after.params).all() and (after.params != new.params).any()


@every
def test_one_zero_update_among_others_gives_no_nan(cls):
    cohort = updates()
    cohort[2] = replace(cohort[2], delta=np.zeros_like(cohort[2].delta))
    assert np.isfinite(turn(cls(), cohort, start()).params).all()


@combining
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_updates_d_is_zero(cls, dtype):
    state = start(dtype=dtype)
    d = cls().combine([], state, updates(1)[0])
    assert d.dtype == dtype and d.tolist() == [0.0] * 40
    assert cls().remember([], state) == {}


@combining
def test_combining_does_not_change_its_inputs_and_keeps_the_dtype(cls):
    strategy, state = cls(), turn(cls(), updates(), start())
    cohort = updates(seed=3)
    for array in (state.params, *(update.delta for update in cohort), *state.memory.values()):
        array.flags.writeable = False
    one, two = d_of(strategy, cohort, state), d_of(strategy, cohort, state)
    assert one.dtype == np.float32 and one.tobytes() == two.tobytes()
    assert not any(np.shares_memory(one, array) for array in (state.params, *state.memory.values()))
    wide = replace(state, params=state.params.astype(np.float64))
    assert d_of(strategy, cohort, wide).dtype == np.float64


@every
def test_a_step_is_pure(cls):
    strategy, state = cls(), start()
    state = turn(strategy, updates(), state)  # so that the memory is not empty
    cohort = updates(seed=3)
    d = d_of(strategy, cohort, state)
    for array in (state.params, d, *state.memory.values()):
        array.flags.writeable = False
    before = {name: array.copy() for name, array in state.memory.items()}
    one, two = strategy.step(d, state), strategy.step(d, state)
    assert one.params.tobytes() == two.params.tobytes()
    assert not np.shares_memory(one.params, state.params)
    assert {n: a.tobytes() for n, a in state.memory.items()} == {
        n: a.tobytes() for n, a in before.items()
    }
    assert state.version == 1 and one.version == 2


@every
@pytest.mark.parametrize("number", [float, np.float64])
def test_float32_stays_float32(cls, number):
    defaults = {f.name: number(f.default) for f in fields(cls) if isinstance(f.default, float)}
    strategy, state = cls(**defaults), start()
    for seed in range(2):
        state = turn(strategy, updates(seed=seed), state)
    assert state.params.dtype == np.float32
    assert all(
        array.dtype == np.float32
        for array in state.memory.values()
        if array.shape == state.params.shape
    )


@every
def test_memory_survives_a_checkpoint(cls):
    strategy, state = cls(), start()
    for seed in range(2):
        state = turn(strategy, updates(seed=seed), state)
    restored = replace(state, memory=load(save(state.memory)))
    cohort = updates(seed=9)
    one, two = turn(strategy, cohort, state), turn(strategy, cohort, restored)
    assert one.params.tobytes() == two.params.tobytes()
    assert {n: a.tobytes() for n, a in one.memory.items()} == {
        n: a.tobytes() for n, a in two.memory.items()
    }
    assert strategy.unsaved == ()


@every
def test_the_memory_of_other_parts_of_the_server_is_kept(cls):
    state = replace(start(), memory={"clip_norm": np.array(0.5)})
    state = turn(cls(), updates(), state)
    assert state.memory["clip_norm"] == 0.5


@every
def test_the_file_in_conf_has_the_class_and_its_defaults(cls):
    lines = (CONF / f"{cls().name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    values = dict(line.split(": ", 1) for line in lines[1:])
    assert values.pop("_target_") == f"{cls.__module__}.{cls.__name__}"
    assert {k: json.loads(v) for k, v in values.items()} == {f.name: f.default for f in fields(cls)}


def refused(cls, **values) -> list[str]:
    with pytest.raises(ConfigError) as error:
        cls(**values)
    return error.value.problems


@every
def test_every_field_is_an_option_with_a_meaning(cls):
    assert all(field.default is not MISSING for field in fields(cls))
    for one in options_of(cls, "strategy"):
        assert one.facts.help.endswith(".") and "  " not in one.facts.help
        assert one.facts.help[0].isalnum() and one.facts.allowed.words, one.key
        assert one.kinds in {(int,), (float,), (str,)} and one.problem(one.default) == ""


@every
@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf"), "much", None, True])
def test_wrong_values_are_refused_all_at_once_as_they_are_typed(cls, wrong):
    defaults = {field.name: field.default for field in fields(cls)}
    problems = refused(cls, **dict.fromkeys(defaults, wrong)) if defaults else []
    assert len(problems) == len(defaults)
    for problem, (name, default) in zip(problems, defaults.items(), strict=True):
        assert problem.startswith(f"strategy.{name}={typed(wrong)}: must be ")
        assert problem.endswith(f", or leave it out for the default, {default}")
        if isinstance(default, int):
            [half] = refused(cls, **{name: 2.5})
            assert half.startswith(f"strategy.{name}=2.5: must be a whole number, at least")


def test_a_problem_says_what_is_allowed():
    assert refused(FedAdam, eta=-1, beta1=1.0, tau="x") == [
        "strategy.eta=-1: must be above 0, or leave it out for the default, 0.001",
        "strategy.beta1=1.0: must be from 0 to below 1, or leave it out for the default, 0.9",
        "strategy.tau=x: must be a number, above 0, or leave it out for the default, 0.001",
    ]
    assert refused(FedBuff, staleness="hing") == [
        "strategy.staleness=hing: must be constant, polynomial or hinge; did you mean 'hinge'?"
    ]
    assert FedAdam(eta=1, tau=np.float32(0.5), beta1=Fraction(1, 2)).eta == 1


def test_a_rule_from_outside_may_have_any_fields_and_those_of_known_types_are_checked():
    @dataclass(frozen=True)
    class Mine(Strategy):
        warm: bool = False
        eta: float = 0.5
        name_of: str | None = None
        table: tuple[float, ...] = (1.0,)
        kept: int = option(3, "Something.", allowed=at_least(2))

    assert Mine(warm=True, eta=2, name_of="x", table=()).warm
    assert refused(Mine, warm=1, eta="2", name_of=3, table=None, kept=1) == [
        "strategy.warm=1: must be true or false, or leave it out for the default, false",
        "strategy.eta=2: must be a number, or leave it out for the default, 0.5",
        "strategy.name_of=3: must be a text or null; a text that looks like a number is written in"
        " quotes",
        "strategy.kept=1: must be at least 2, or leave it out for the default, 3",
    ]


def test_a_type_that_only_type_checkers_know_switches_no_other_check_off():
    @dataclass(frozen=True)
    class Mine(Strategy):
        table: Unknown = None  # noqa: F821  # pyright: ignore[reportUndefinedVariable]
        eta: float = 0.5

    assert Mine(table=3).eta == 0.5
    [problem] = refused(Mine, eta="much")
    assert problem.startswith("strategy.eta=much: must be a number")


def test_by_default_the_weight_falls_with_the_discount():
    """So privacy=client, which weights by the discount alone, loses nothing of it."""

    @dataclass(frozen=True)
    class Stale(Strategy):
        def discount(self, staleness):
            return 0.5**staleness

    update = replace(updates(1)[0], tokens=100)
    assert [Stale().weight(update, tau) for tau in (0, 1, 2)] == [100.0, 50.0, 25.0]


@every
def test_a_weight_falls_with_staleness_only_as_the_discount_does(cls):
    rule, update = cls(), replace(updates(1)[0], tokens=100)
    if rule.linear:
        fresh = rule.weight(update, 0)
        assert [rule.weight(update, tau) for tau in range(20)] == [
            fresh * rule.discount(tau) for tau in range(20)
        ]


@every
def test_a_refused_pacing_has_a_reason_and_an_alternative(cls):
    rules = {other().name: other for other in ALL}
    assert set(cls.refused_pacings) == {"cohort", "buffer"} - cls.paces
    for pace, reason in cls.refused_pacings.items():
        named = re.findall(r"strategy=(\w+)", reason)
        assert named and all(pace in rules[name].paces for name in named)


@every
def test_a_usual_cohort_or_buffer_has_no_problem(cls):
    pacing = Pacing("cohort", 8, 8) if "cohort" in cls.paces else Pacing("buffer", 8, 1)
    assert list(cls().problems(pacing)) == []


def test_the_base_class_is_federated_averaging():
    base, state, pacing = Strategy(), start(), Pacing("cohort", 5, 5)
    cohort = updates()
    assert base.linear and base.paces == {"cohort"} and base.client_numbers() == {}
    assert base.weight(cohort[0], 3) == cohort[0].tokens
    for weights in ([1e16, 1.0, 1.0], [1.0, 1.0, 1e16]):
        assert base.divisor(weights, pacing) == 1e16 + 2
    assert list(base.problems(pacing)) == [] and base.remember(cohort, state) == {}
    one, two = turn(base, cohort, state), turn(FedAvg(), cohort, state)
    assert one.params.tobytes() == two.params.tobytes()
    with pytest.raises(NotImplementedError, match="linear"):
        base.combine(ready(base, cohort, state), state)


def test_overriding_combine_makes_a_rule_non_linear():
    class Middle(Strategy):
        def combine(self, updates, state, root=None):
            return np.median(np.stack([update.delta for update in updates]), axis=0)

    assert not Middle().linear
    assert Middle().name == "middle"


def test_a_step_cannot_change_the_shape():
    with pytest.raises(ValueError, match="shape"):
        advance(start(3), np.zeros((2, 3), np.float32))


def test_strategies_import_neither_torch_nor_flower():
    script = (
        "import sys, fedgpt.aggregate.exact, fedgpt.aggregate.fedadam;"
        " print(*map(sys.modules.get, ('torch', 'flwr')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["None", "None"]
