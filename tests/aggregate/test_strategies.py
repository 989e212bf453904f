"""Properties of every strategy in the folder, then each one's own numbers (equalities of the strategies note)."""

import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import MISSING, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

import fedgpt.aggregate
from fedgpt.aggregate.base import Strategy, advance
from fedgpt.aggregate.diloco import DiLoCo
from fedgpt.aggregate.exact import ExactSum
from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedavgm import FedAvgM
from fedgpt.aggregate.fedprox import FedProx
from fedgpt.aggregate.fedyogi import FedYogi
from fedgpt.core.errors import ConfigError
from fedgpt.core.messages import ServerState, Update

CONF = Path(__file__).parents[2] / "conf" / "strategy"


def descendants(cls):
    return {cls}.union(*(descendants(sub) for sub in cls.__subclasses__())) if cls.__subclasses__() else {cls}


def every_strategy():
    package = fedgpt.aggregate
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found = descendants(Strategy) - {Strategy}
    return sorted((c for c in found if c.__module__.startswith(package.__name__)), key=lambda c: c.__name__)


ALL = every_strategy()
every = pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)


def updates(n=5, size=40, seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    deltas = (rng.standard_normal((n, size)) * scale).astype(np.float32)
    return [Update(f"client{i}", 0, 0, delta, int(rng.integers(1, 1000))) for i, delta in enumerate(deltas)]


def start(size=40, dtype=np.float32, seed=1):
    return ServerState((np.random.default_rng(seed).standard_normal(size) * 0.02).astype(dtype))


def d_of(strategy, cohort, state):
    """What the engine does with a cohort, in the order it is given."""
    if not strategy.linear:
        return strategy.combine(cohort, state)
    weights = [strategy.weight(update, 0) for update in cohort]
    total = ExactSum(state.params.size, bound=1.0, count=len(cohort), max_weight=max(weights))
    for update, weight in zip(cohort, weights, strict=True):
        total.add(update.delta, weight)
    return total.mean(strategy.divisor(weights, "cohort"))


def run(strategy, ds, state):
    """Parameters after each step."""
    history = []
    for d in ds:
        state = strategy.step(d, state)
        history.append(state.params)
    return history


def test_all_strategies_are_found():
    assert {DiLoCo, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi} <= set(ALL)


@every
def test_moves_toward_a_unanimous_update(cls):
    strategy, state, base = cls(), start(), updates(1)[0]
    cohort = [replace(base, client=f"client{i}", tokens=i + 1) for i in range(4)]
    for _ in range(3):
        new = strategy.step(d_of(strategy, cohort, state), state)
        moved = new.params - state.params
        assert (np.sign(moved) == -np.sign(base.delta)).all()
        state = new


@every
def test_order_of_arrival_is_irrelevant(cls):
    strategy, state, cohort = cls(), start(), updates(7)
    reference = strategy.step(d_of(strategy, cohort, state), state)
    for seed in range(5):
        shuffled = [cohort[i] for i in np.random.default_rng(seed).permutation(len(cohort))]
        assert strategy.step(d_of(strategy, shuffled, state), state).params.tobytes() == reference.params.tobytes()


@every
def test_negated_updates_move_the_other_way(cls):
    strategy, state = cls(), ServerState(np.zeros(40, np.float32))
    one = strategy.step(d_of(strategy, updates(), state), state)
    negated = [replace(update, delta=-update.delta) for update in updates()]
    two = strategy.step(d_of(strategy, negated, state), state)
    np.testing.assert_array_equal(one.params, -two.params)


@every
def test_a_zero_update_with_empty_memory_changes_nothing(cls):
    state = start()
    new = cls().step(np.zeros_like(state.params), state)
    assert new.params.tobytes() == state.params.tobytes()
    assert new.version == state.version + 1


@every
def test_a_step_is_pure(cls):
    strategy, state = cls(), start()
    state = strategy.step(d_of(strategy, updates(), state), state)  # with something in memory
    cohort = updates(seed=3)
    d = d_of(strategy, cohort, state)
    for array in (state.params, d, *state.memory.values()):
        array.flags.writeable = False
    before = {name: array.copy() for name, array in state.memory.items()}
    one, two = strategy.step(d, state), strategy.step(d, state)
    assert one.params.tobytes() == two.params.tobytes()
    assert not np.shares_memory(one.params, state.params)
    assert {n: a.tobytes() for n, a in state.memory.items()} == {n: a.tobytes() for n, a in before.items()}
    assert state.version == 1 and one.version == 2


@every
@pytest.mark.parametrize("number", [float, np.float64])
def test_float32_stays_float32(cls, number):
    defaults = {f.name: number(f.default) for f in fields(cls) if isinstance(f.default, float)}
    strategy, state = cls(**defaults), start()
    for seed in range(2):
        state = strategy.step(d_of(strategy, updates(seed=seed), state), state)
    assert state.params.dtype == np.float32
    assert all(array.dtype == np.float32 for array in state.memory.values() if array.shape == state.params.shape)


@every
def test_memory_survives_a_checkpoint(cls):
    strategy, state = cls(), start()
    for seed in range(2):
        state = strategy.step(d_of(strategy, updates(seed=seed), state), state)
    restored = replace(state, memory=load(save(state.memory)))
    cohort = updates(seed=9)
    one = strategy.step(d_of(strategy, cohort, state), state)
    two = strategy.step(d_of(strategy, cohort, restored), restored)
    assert one.params.tobytes() == two.params.tobytes()
    assert {n: a.tobytes() for n, a in one.memory.items()} == {n: a.tobytes() for n, a in two.memory.items()}
    assert strategy.unsaved == ()


@every
def test_memory_of_others_is_kept(cls):
    state = replace(start(), memory={"clip_norm": np.array(0.5)})
    state = cls().step(d_of(cls(), updates(), state), state)
    assert state.memory["clip_norm"] == 0.5


@every
def test_conf_names_the_class_and_its_defaults(cls):
    lines = (CONF / f"{cls().name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    values = dict(line.split(": ", 1) for line in lines[1:])
    assert values.pop("_target_") == f"{cls.__module__}.{cls.__name__}"
    assert {k: json.loads(v.split("#")[0]) for k, v in values.items()} == {f.name: f.default for f in fields(cls)}


@every
def test_wrong_numbers_are_refused_by_name(cls):
    assert all(field.default is not MISSING for field in fields(cls))
    for field in fields(cls):
        for wrong in (-1, float("nan"), float("inf"), "much", None, True):
            with pytest.raises(ConfigError, match=rf"strategy\.{field.name}={wrong} must be a number") as error:
                cls(**{field.name: wrong})
            assert f"default, {field.default}" in str(error.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        FedAdam(eta=0, beta1=1.0, beta2=0.5, tau=-1)
    assert len(error.value.problems) == 3


def test_the_frame_is_federated_averaging():
    frame, state = Strategy(), start()
    cohort = updates()
    assert frame.linear and frame.paces == {"cohort"} and frame.client_numbers() == {}
    assert frame.weight(cohort[0], 3) == cohort[0].tokens
    assert frame.divisor([1e16, 1.0, 1.0], "cohort") == frame.divisor([1.0, 1.0, 1e16], "cohort") == 1e16 + 2
    d = d_of(frame, cohort, state)
    assert frame.step(d, state).params.tobytes() == FedAvg().step(d, state).params.tobytes()
    with pytest.raises(NotImplementedError, match="linear"):
        frame.combine(cohort, state)


def test_overriding_combine_makes_a_rule_non_linear():
    class Median(Strategy):
        def combine(self, updates, state):
            return np.median(np.stack([update.delta for update in updates]), axis=0)

    assert not Median().linear
    assert Median().name == "median"


def test_a_step_cannot_change_the_shape():
    with pytest.raises(ValueError, match="shape"):
        advance(start(3), np.zeros((2, 3), np.float32))


def test_aggregate_imports_in_no_time():
    script = (
        "import sys, fedgpt.aggregate.exact, fedgpt.aggregate.fedadam; print(*map(sys.modules.get, ('torch', 'flwr')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["None", "None"]


# Each rule's own numbers.

STEPS = 8


def setup_e():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, 5, generator=generator, dtype=torch.float64).numpy()


def torch_history(optimizer, ds):
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    opt, history = optimizer([theta]), []
    for d in ds:
        theta.grad = torch.from_numpy(d.copy())
        opt.step()
        history.append(theta.detach().numpy().copy())
    return history


@pytest.mark.parametrize(
    "strategy, optimizer",
    [
        (FedAvg(eta=0.7), lambda p: torch.optim.SGD(p, lr=0.7)),
        (FedAvgM(eta=0.7, mu=0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9)),
        (DiLoCo(eta=0.7, mu=0.9), lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True)),
    ],
)
def test_equals_torch_sgd(strategy, optimizer):
    ds = setup_e()
    ours = run(strategy, ds, ServerState(np.zeros(5)))
    np.testing.assert_allclose(ours, torch_history(optimizer, ds), rtol=0, atol=1e-14)


def test_fedadam_equals_torch_adam_but_for_the_bias_correction():
    ds, eta, tau, state = setup_e(), 0.1, 1e-3, ServerState(np.zeros(5), memory={"second_moment": np.zeros(5)})
    history = []
    for t, d in enumerate(ds, 1):  # Adam's correction, put into eta and tau
        root = (1 - 0.99**t) ** 0.5
        state = FedAdam(eta=eta * root / (1 - 0.9**t), tau=tau * root).step(d, state)
        history.append(state.params)
    expected = torch_history(lambda p: torch.optim.Adam(p, lr=eta, betas=(0.9, 0.99), eps=tau), ds)
    np.testing.assert_allclose(history, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("cls, second", [(FedAdam, 0.1980198), (FedYogi, 0.1985136)])
def test_hand_values_of_the_adaptive_rules(cls, second):
    strategy = cls(eta=0.1)
    state = strategy.step(np.array([-1.0]), ServerState(np.zeros(1), memory={"second_moment": np.zeros(1)}))
    assert state.params[0] == pytest.approx(0.0990099, abs=1e-7)
    assert strategy.step(np.array([-0.1]), state).params[0] == pytest.approx(second, abs=1e-7)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi])
def test_adaptive_rules_equal_the_paper_in_plain_floats(cls):
    """From v0 = tau^2; large and small D so that Yogi's sign takes both values."""
    ds = [1.0, -0.5, 0.01, 0.3, -0.002]
    eta, b1, b2, tau = 0.05, 0.9, 0.99, 0.1
    theta, m, v, expected = 0.0, 0.0, tau * tau, []
    for d in ds:
        m = b1 * m + (1 - b1) * d
        if cls is FedAdam:
            v = b2 * v + (1 - b2) * d * d
        elif v > d * d:
            v -= (1 - b2) * d * d
        else:
            v += (1 - b2) * d * d
        theta -= eta * m / (v**0.5 + tau)
        expected.append(theta)
    ours = run(cls(eta=eta, beta1=b1, beta2=b2, tau=tau), [np.array([d]) for d in ds], ServerState(np.zeros(1)))
    np.testing.assert_allclose(np.ravel(ours), expected, rtol=1e-12)


@pytest.mark.parametrize("mu, gains", [(0.9, {1: 1.9, 2: 2.71, 5: 4.69, 10: 6.86}), (0.6, {1: 1.6, 2: 1.96, 5: 2.38})])
def test_gain_of_nesterov_on_a_constant_update(mu, gains):
    history = [0.0, *np.ravel(run(DiLoCo(eta=1.0, mu=mu), [np.ones(1)] * 10, ServerState(np.zeros(1))))]
    for t, gain in gains.items():
        assert history[t - 1] - history[t] == pytest.approx((1 - mu ** (t + 1)) / (1 - mu))
        assert history[t - 1] - history[t] == pytest.approx(gain, abs=0.006)


def test_nesterov_is_not_heavy_ball_but_one_step_ahead_on_a_constant_update():
    ds = setup_e()
    ball, nesterov = FedAvgM(eta=0.7, mu=0.9), DiLoCo(eta=0.7, mu=0.9)
    one, two = (run(rule, ds, ServerState(np.zeros(5)))[-1] for rule in (ball, nesterov))
    assert np.linalg.norm(one - two) / np.linalg.norm(two) > 0.1
    constant = [ds[0]] * STEPS
    one, two = (np.diff(run(rule, constant, ServerState(np.zeros(5))), axis=0) for rule in (ball, nesterov))
    np.testing.assert_allclose(two[:-1], one[1:], rtol=1e-12)


def test_momentum_on_every_arrival_is_why_diloco_is_for_cohorts_only():
    moved = [-run(DiLoCo(eta=1.0), [np.ones(1)] * k, ServerState(np.zeros(1)))[-1][0] for k in (2, 4, 8)]
    assert moved == pytest.approx([4.61, 12.1441, 33.868], abs=1e-3)
    assert "buffer" not in DiLoCo.paces


def test_fedavg_is_the_weighted_mean_of_the_clients_models():
    state, cohort = start(), updates()
    tokens = np.array([update.tokens for update in cohort], np.float64)
    models = np.stack([state.params.astype(np.float64) - update.delta for update in cohort])
    new = FedAvg().step(d_of(FedAvg(), cohort, state), state)
    np.testing.assert_allclose(new.params, (tokens[:, None] * models).sum(0) / tokens.sum(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("twin", [FedAvgM(mu=0), DiLoCo(eta=1, mu=0), FedProx(mu=0)])
def test_without_its_number_a_rule_is_fedavg(twin):
    state = start()
    ds = [d_of(FedAvg(), updates(seed=seed), state) for seed in range(3)]
    np.testing.assert_allclose(run(twin, ds, state), run(FedAvg(), ds, state), rtol=1e-6)


def test_scale_acts_on_the_update_not_on_the_parameters():
    state = start()
    d = d_of(FedAvg(), updates(), state)
    one, two = FedAvg().step(d, state), FedAvg(eta=2).step(d, state)
    np.testing.assert_allclose(two.params - state.params, 2 * (one.params - state.params), rtol=0, atol=1e-8)


def test_proximal_mu_goes_to_the_clients_by_name():
    assert FedProx(mu=0.5).client_numbers() == {"proximal_mu": 0.5}
    assert FedProx().client_numbers() == {"proximal_mu": 0.01}
