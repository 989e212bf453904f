"""Flower's strategies in the server give the same bits as direct calls on the same updates."""

import gc
import logging
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as stock
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load, save

from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import ServerState, Update
from fedgpt.flower.strategy_adapter import FlowerStrategy

SIZE, CLIENTS = 30, 8
STOCK = {
    "FedAvg": stock.FedAvg,
    "FedProx": lambda: stock.FedProx(proximal_mu=0.1),
    "FedAvgM": lambda: stock.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
    "FedAvgM off": stock.FedAvgM,
    "FedAdam": lambda: stock.FedAdam(eta=0.01),
    "FedAdam float64": lambda: stock.FedAdam(eta=np.float64(0.01), beta_1=np.float64(0.9)),
    "FedAdagrad": stock.FedAdagrad,
    "FedYogi": stock.FedYogi,
    "FedMedian": stock.FedMedian,
    "FedTrimmedAvg": lambda: stock.FedTrimmedAvg(beta=0.2),
    "Krum": lambda: stock.Krum(num_malicious_nodes=1),
    "MultiKrum": lambda: stock.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4),
    "Bulyan": lambda: stock.Bulyan(num_malicious_nodes=1),
    "QFedAvg": lambda: stock.QFedAvg(client_learning_rate=0.1, q=0.2),
}
every = pytest.mark.parametrize("make", STOCK.values(), ids=STOCK.keys())


def cohort(version, n=CLIENTS):
    rng = np.random.default_rng(version)
    return [
        Update(
            f"client{i}",
            version,
            version,
            (rng.standard_normal(SIZE) * 0.01).astype(np.float32),
            int(rng.integers(1, 1000)),
            {"loss": float(rng.uniform(1, 2)), "tokens_per_second": 3.0},
        )
        for i in range(n)
    ]


def start():
    return ServerState((np.random.default_rng(99).standard_normal(SIZE) * 0.02).astype(np.float32))


def shuffled(updates, seed=0):
    return [updates[i] for i in np.random.default_rng(seed).permutation(len(updates))]


class Nodes:
    def get_node_ids(self):
        return list(range(1, CLIENTS + 1))


@pytest.fixture
def identity():
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    gc.freeze()  # QFedAvg and Bulyan collect garbage for every reply
    yield
    gc.unfreeze()
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


def by_hand(strategy, versions):
    """The parameters of all rounds, with one instance of the strategy, as in Flower's start()."""
    params, history = start().params, []
    for version in range(versions):
        arrays = ArrayRecord({"w": Array(params)})
        messages = list(strategy.configure_train(version + 1, arrays, ConfigRecord(), Nodes()))
        replies = []
        for update, message in zip(cohort(version), messages, strict=True):
            metrics = {"num-examples": update.tokens, "train_loss": update.metrics["loss"]}
            weights = ArrayRecord({"w": Array(params - update.delta)})
            content = RecordDict({"arrays": weights, "metrics": MetricRecord(metrics)})
            replies.append(Message(content, reply_to=message))
        arrays, _ = strategy.aggregate_train(version + 1, replies)
        params = next(iter(arrays.values())).numpy().astype(np.float32)
        history.append(params)
    return history


def ours(strategy, state, versions, resume=False):
    history = []
    for version in versions:
        updates = shuffled(cohort(version), seed=version)
        state = strategy.step(strategy.combine(updates, state), state)
        if resume:
            state = replace(state, memory=load(save(state.memory)))
        history.append(state.params)
    return history, state


@every
def test_a_strategy_gives_the_bits_of_direct_calls(make, identity):
    theirs = by_hand(make(), 4)
    history, state = ours(FlowerStrategy(make()), start(), range(4))
    assert [p.tobytes() for p in history] == [p.tobytes() for p in theirs]
    assert state.version == 4 and state.params.dtype == np.float32


@every
def test_a_resumed_run_gives_the_same_bits(make):
    complete, _ = ours(FlowerStrategy(make()), start(), range(4))
    first, state = ours(FlowerStrategy(make()), start(), range(2), resume=True)
    second, _ = ours(FlowerStrategy(make()), state, range(2, 4))
    assert FlowerStrategy(make()).unsaved == ()
    assert [p.tobytes() for p in first + second] == [p.tobytes() for p in complete]


@every
def test_a_step_is_a_function_of_updates_and_state(make):
    strategy = FlowerStrategy(make())
    _, state = ours(strategy, start(), range(2))
    state.params.flags.writeable = False
    for array in state.memory.values():
        array.flags.writeable = False
    draws = random.getstate()
    one, _ = ours(strategy, state, range(2, 4))
    ours(strategy, start(), range(3))  # other steps in between
    two, _ = ours(strategy, state, range(2, 4))
    assert [p.tobytes() for p in one] == [p.tobytes() for p in two]
    assert random.getstate() == draws


@every
def test_a_step_applies_a_unanimous_update(make):
    strategy, state, base = FlowerStrategy(make()), start(), cohort(0)[0]
    updates = [replace(base, client=f"client{i}") for i in range(CLIENTS)]
    d = strategy.combine(updates, state)
    assert (np.sign(d) == np.sign(base.delta)).all()
    np.testing.assert_array_equal(state.params - strategy.step(d, state).params, d)


def test_memory_holds_the_moments_and_no_copy_of_the_model():
    sizes = {}
    for name, make in STOCK.items():
        _, state = ours(FlowerStrategy(make()), start(), range(2))
        sizes[name] = sorted(key.split(".")[1] for key in state.memory)
    assert {name: found for name, found in sizes.items() if found} == {
        "FedAvgM": ["momentum_vector"],
        "FedAdam": ["m_t", "v_t"],
        "FedAdam float64": ["m_t", "v_t"],
        "FedAdagrad": ["m_t", "v_t"],
        "FedYogi": ["m_t", "v_t"],
    }


def test_without_updates_the_model_does_not_change():
    for make in STOCK.values():
        state = start()
        strategy = FlowerStrategy(make())
        new = strategy.step(strategy.combine([], state), state)
        assert new.params.tobytes() == state.params.tobytes() and new.version == 1


def test_a_skipped_round_is_logged(caplog):
    state, strategy = start(), FlowerStrategy(stock.Bulyan(num_malicious_nodes=1))
    with caplog.at_level(logging.WARNING):
        new = strategy.step(strategy.combine(cohort(0, 3), state), state)
    assert new.params.tobytes() == state.params.tobytes()
    assert "skipped version 1 with 3 updates" in caplog.text


def test_minimum_numbers_of_clients_of_flower_are_ignored():
    strategy = FlowerStrategy(stock.FedAvg(min_available_nodes=50, min_train_nodes=40))
    state = start()
    update = cohort(0)[0]
    new = strategy.step(strategy.combine([update], state), state)
    np.testing.assert_allclose(new.params, state.params - update.delta, rtol=0, atol=1e-8)


def test_fedavg_of_flower_agrees_with_our_own():
    state, updates = start(), cohort(0)
    theirs = FlowerStrategy(stock.FedAvg())
    total = sum(u.tokens for u in updates)
    d = np.float32(sum(u.tokens * u.delta.astype(np.float64) for u in updates) / total)
    ours_ = FedAvg().step(d, state)
    np.testing.assert_allclose(
        theirs.step(theirs.combine(updates, state), state).params, ours_.params, atol=1e-8
    )


def test_the_contract_of_a_strategy():
    strategy = FlowerStrategy(stock.FedProx(proximal_mu=0.25))
    assert (
        not strategy.linear and strategy.paces == {"cohort"} and strategy.name == "flower.FedProx"
    )
    assert strategy.client_numbers() == {"proximal_mu": 0.25}
    assert FlowerStrategy(stock.FedAvg()).client_numbers() == {}


def test_step_needs_the_result_of_combine():
    strategy, state = FlowerStrategy(stock.FedAvg()), start()
    d = strategy.combine(cohort(0), state)
    for changed in (np.asarray(d), d * 2):
        with pytest.raises(TypeError, match="its own combine"):
            strategy.step(changed, state)


def test_clients_are_ordered_by_id_and_keep_their_node():
    class Spy(stock.FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append((server_round, []))
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            seen.append((server_round, [reply.metadata.src_node_id for reply in replies]))
            return super().aggregate_train(server_round, replies)

    seen = []
    strategy = FlowerStrategy(Spy())
    ours(strategy, start(), range(2))
    assert [number for number, _ in seen] == [1, 1, 2, 2]
    assert seen[1][1] == seen[3][1] and len(set(seen[1][1])) == CLIENTS


def run_of_this_process() -> int | None:
    try:
        return TaskIdentity.run_id
    except RuntimeError:
        return None


def test_global_state_is_restored():
    before = run_of_this_process()  # None, or what an earlier test of this process has left
    FlowerStrategy(stock.FedAvg()).combine(cohort(0), start())
    assert run_of_this_process() == before
    assert logging.getLogger("flwr").level != logging.WARNING


def test_a_numpy_number_a_list_and_none_are_remembered(identity):
    class Odd(stock.FedAvg):
        def __init__(self):
            super().__init__()
            self.rate, self.calls, self.trace, self.limit = None, 0, [], 1.0

        def configure_train(self, server_round, arrays, config, grid):
            self.calls += 1
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            mean = next(iter(arrays.values())).numpy()
            # float64 times float32
            scaled = mean * (np.float64(1) if self.rate is None else self.rate)
            self.rate = np.float64(1 / (2 + self.calls))
            self.trace.append(np.array(float(self.calls)))
            self.limit = None
            assert [int(item) for item in self.trace] == list(range(1, self.calls + 1))
            return ArrayRecord({"params": Array(scaled)}), metrics

    complete, end = ours(FlowerStrategy(Odd()), start(), range(12))
    _, state = ours(FlowerStrategy(Odd()), start(), range(11), resume=True)
    resumed, _ = ours(FlowerStrategy(Odd()), state, [11])
    assert resumed[0].tobytes() == complete[11].tobytes()
    assert [p.tobytes() for p in complete] == [p.tobytes() for p in by_hand(Odd(), 12)]
    assert end.memory["flower.calls.number."] == 12


class RememberingSet(stock.FedAvg):
    """Remembers a value that no checkpoint can store."""

    def __init__(self, late):
        super().__init__()
        if not late:
            self.seen = {0}

    def aggregate_train(self, server_round, replies):
        self.seen = {*getattr(self, "seen", ()), server_round}
        self.total = len(self.seen)
        return super().aggregate_train(server_round, replies)


@pytest.mark.parametrize("late", [False, True])
def test_a_strategy_that_cannot_be_saved_is_reported_and_still_works(late, caplog):
    strategy = FlowerStrategy(RememberingSet(late))
    assert (strategy.unsaved == ()) is late
    with caplog.at_level(logging.WARNING):
        ours(strategy, start(), range(3))
    assert strategy.unsaved == ("seen",)
    assert {1, 2, 3} <= strategy.inner.seen
    assert ("cannot be resumed" in caplog.text) is late


@pytest.mark.parametrize(
    "inner, reason",
    [
        (stock.FedXgbBagging(), "decision trees"),
        (stock.FedXgbCyclic(), "decision trees"),
        (
            stock.DifferentialPrivacyServerSideFixedClipping(stock.FedAvg(), 1.0, 1.0, 2),
            "privacy=client",
        ),
        (
            stock.DifferentialPrivacyClientSideAdaptiveClipping(stock.FedAvg(), 0.01, 2),
            "privacy=client",
        ),
        (stock.FedAvg(fraction_train=0.5), r"fraction_train=0.5.*pace\.clients"),
        (object(), "not a strategy of Flower"),
    ],
)
def test_a_strategy_that_cannot_work_is_refused_with_the_reason(inner, reason):
    with pytest.raises(ConfigError, match=reason):
        FlowerStrategy(inner)


AVERAGE = "strategy._target_=flwr.serverapp.strategy.FedAvg"
FLOWER_REMEDIES = [
    (
        stock.FedXgbBagging(),
        "take strategy=fedavg or another",
        [["strategy=fedavg"], ["strategy=flower", AVERAGE]],
    ),
    (
        stock.DifferentialPrivacyServerSideFixedClipping(stock.FedAvg(), 1.0, 1.0, 2),
        "take another strategy and privacy=client",
        [["strategy=fedavg", "privacy=client"]],
    ),
    (
        stock.FedAvg(fraction_train=0.5),
        "set pace.clients or pace.rate",
        [
            ["strategy=flower", AVERAGE, "pace.clients=4"],
            ["strategy=flower", AVERAGE, "pace.rate=0.5"],
        ],
    ),
]


@pytest.mark.parametrize(("inner", "remedy", "followed"), FLOWER_REMEDIES)
def test_what_the_refusal_of_a_strategy_advises_is_accepted(inner, remedy, followed):
    with pytest.raises(ConfigError) as refused:
        FlowerStrategy(inner)
    assert remedy in str(refused.value)
    for words in followed:
        built = compose.build_strategy(compose.load(words).strategy)
        if "strategy=flower" in words:
            FlowerStrategy(built)


@pytest.mark.parametrize(
    "result, message",
    [
        (np.full(SIZE, np.nan, np.float32), "NaN"),
        (np.full(SIZE, 1e300), "infinite"),
        (np.zeros((2, SIZE), np.float32), "instead of one array"),
    ],
)
def test_a_bad_model_stops_the_run_with_a_message(result, message):
    class Bad(stock.FedAvg):
        def aggregate_train(self, server_round, replies):
            return ArrayRecord({"params": Array(result)}), None

    with pytest.raises(FedGPTError, match=message):
        FlowerStrategy(Bad()).combine(cohort(0), start())


def test_a_failing_strategy_is_an_error_with_its_reason():
    updates = [replace(update, metrics={}) for update in cohort(0)]
    with pytest.raises(FedGPTError, match="train_loss"):
        FlowerStrategy(STOCK["QFedAvg"]()).combine(updates, start())
    with pytest.raises(FedGPTError, match=r"flower\.FedAvg could not aggregate 8 updates"):
        FlowerStrategy(stock.FedAvg(arrayrecord_key="metrics")).combine(cohort(0), start())


def test_the_conf_file_names_a_strategy_of_flower():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    inner = instantiate(
        OmegaConf.load(Path(__file__).parents[2] / "conf" / "strategy" / "flower.yaml")
    )
    assert FlowerStrategy(inner).name == "flower.FedAvg"
