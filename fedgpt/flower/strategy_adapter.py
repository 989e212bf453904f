"""Flower's own strategies inside our loop: `flwr.serverapp.strategy.*` as a strategy of ours.

A server step becomes one round of Flower: `configure_train` (where a strategy learns the global
arrays), then `aggregate_train` on replies that hold the clients' weights, in the order of stable
client ids. Sampling, deadlines and validation stay with our engine. What the strategy remembers
between rounds goes through `state.memory`, so each step is a function of updates and state alone,
and a resumed run gives the same bits.
"""

from __future__ import annotations

import copy
import gc
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp import strategy as stock
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.aggregate.base import Strategy
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.messages import ServerState, Update
from fedgpt.core.seeds import derive_seed

log = logging.getLogger(__name__)

ARRAY = "params"  # key of the one flat array in every record
MEMORY = "flower"  # first part of our names in state.memory: flower.<attribute>.<kind>.<key>


class Replacement(np.ndarray):
    """D of a strategy that computes the next model itself: params - next, with that next state
    attached.

    params - (params - next) is not `next`, bit for bit, so `step` takes the state from here.
    """

    state: ServerState


@dataclass(frozen=True, eq=False)
class FlowerStrategy(Strategy):
    """Runs any strategy of Flower that averages arrays, cohort pacing only.

    pace= decides who takes part: min_*_nodes and fraction_evaluate have no effect here. Metrics
    that all updates of a step have are passed on under their names, tokens trained as the
    strategy's weight (`num-examples`).
    """

    inner: stock.Strategy
    # attributes as constructed, those we can compare
    _fresh: dict[str, Any] = field(init=False, repr=False)
    _unsaved: set[str] = field(init=False, repr=False)  # attributes that no checkpoint can carry

    def __post_init__(self) -> None:
        if problem := _refusal(self.inner):
            raise ConfigError(problem)
        attributes = vars(self.inner)
        plain = {name: value for name, value in attributes.items() if _plain(value)}
        object.__setattr__(self, "_fresh", _copied(plain))
        object.__setattr__(self, "_unsaved", set(attributes) - set(plain))

    @property
    def name(self) -> str:
        """`flower.` and the strategy's class."""
        return f"flower.{type(self.inner).__name__}"

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Attributes of the strategy that a checkpoint cannot carry; some show only at the first
        step.
        """
        return tuple(sorted(self._unsaved))

    def client_numbers(self) -> dict[str, float]:
        """FedProx's factor, under our name for it."""
        mu = getattr(self.inner, "proximal_mu", None)
        return {} if mu is None else {"proximal_mu": float(mu)}

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """One round of the strategy; raises FedGPTError where it fails or returns anything but a
        finite model.

        A strategy that skips a round (no update, too few for Bulyan) leaves the parameters as they
        are.
        """
        updates = sorted(updates, key=lambda update: (update.client, update.number))
        # stable over rounds and restarts
        nodes = [derive_seed(0, "node", update.client) for update in updates]
        record = ArrayRecord({ARRAY: Array(state.params)})
        self._restore(state.memory)
        try:
            with _inside_a_run():
                requests = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes]
                grid = cast(Grid, _Nodes(nodes, self.inner))
                list(self.inner.configure_train(state.version + 1, record, ConfigRecord(), grid))
                learned = _holding(self.inner, state.params)
                replies = [
                    Message(content, reply_to=request)
                    for content, request in zip(
                        self._contents(updates, state), requests, strict=True
                    )
                ]
                arrays, _ = self.inner.aggregate_train(state.version + 1, replies)
        except AppExitException as error:
            raise FedGPTError(
                f"{self.name} could not aggregate {len(updates)} updates: {error}"
            ) from error
        params = state.params if arrays is None else self._checked(arrays, state)
        if arrays is None:
            log.warning(
                "%s skipped version %d with %d updates", self.name, state.version + 1, len(updates)
            )
        memory = self._memory(state.params, params, learned)
        others = {
            name: array for name, array in state.memory.items() if not name.startswith(f"{MEMORY}.")
        }
        d = np.subtract(state.params, params).view(Replacement)
        d.state = ServerState(params, state.version + 1, {**others, **memory})
        return d

    def step(self, d: np.ndarray, state: ServerState) -> ServerState:
        """The state that `combine` computed; d must be its result, unchanged."""
        if not isinstance(d, Replacement) or not hasattr(d, "state"):
            raise TypeError(f"{self.name} steps only on the result of its own combine")
        return d.state

    def _contents(self, updates: Sequence[Update], state: ServerState) -> Iterator[RecordDict]:
        """Replies as Flower's clients send them: weights = base - delta, and metrics."""
        common = set.intersection(*({*update.metrics} for update in updates)) if updates else set()
        loss_key = getattr(self.inner, "train_loss_key", None)
        weight_key = getattr(self.inner, "weighted_by_key", "num-examples")
        arrays_key = getattr(self.inner, "arrayrecord_key", "arrays")
        for update in updates:
            base = state.params if update.base is None else update.base
            metrics: dict[str, Any] = {name: float(update.metrics[name]) for name in sorted(common)}
            if loss_key is not None and loss_key not in metrics:
                if "loss" not in metrics:
                    raise FedGPTError(
                        f"{self.name} needs the metric {loss_key!r} or 'loss' of every client"
                    )
                metrics[loss_key] = metrics["loss"]
            metrics[weight_key] = int(update.tokens)
            weights = ArrayRecord({ARRAY: Array(base - update.delta)})
            yield RecordDict({arrays_key: weights, "metrics": MetricRecord(metrics)})

    def _checked(self, arrays: ArrayRecord, state: ServerState) -> np.ndarray:
        """The strategy's model as float32 (FedAdam's is float64), or FedGPTError."""
        found = [array.numpy() for array in arrays.values()]
        if len(found) != 1 or found[0].shape != state.params.shape:
            raise FedGPTError(
                f"{self.name} returned {[a.shape for a in found]} instead of one array of"
                f" {state.params.shape}"
            )
        with np.errstate(over="ignore"):
            params = found[0].astype(state.params.dtype, copy=False)
        if not np.isfinite(params).all():
            raise FedGPTError(f"{self.name} returned a model with NaN or infinite weights")
        return params

    def _restore(self, memory: dict[str, np.ndarray]) -> None:
        """Give the strategy the attributes it had after the last step, and no others."""
        for name in set(vars(self.inner)) - self._unsaved:
            delattr(self.inner, name)
        vars(self.inner).update(
            _copied({n: v for n, v in self._fresh.items() if n not in self._unsaved})
        )
        vars(self.inner).update(
            _decode({n: v for n, v in memory.items() if n.startswith(f"{MEMORY}.")})
        )

    def _memory(
        self, before: np.ndarray, after: np.ndarray, learned: set[str]
    ) -> dict[str, np.ndarray]:
        """Attributes that differ from a fresh strategy's, as arrays by name.

        A copy of the global model that configure_train sets anew each round is left out: it is a
        model in size.
        """
        memory: dict[str, np.ndarray] = {}
        for name, value in vars(self.inner).items():
            fresh = self._fresh.get(name, _MISSING)
            if name in self._unsaved or _same(value, fresh):
                continue
            emptied = isinstance(value, ArrayRecord | list | dict) and not value
            if name in learned and (emptied or _is_model(value, before) or _is_model(value, after)):
                continue
            encoded = _encode(name, value)
            if encoded is None:
                log.warning(
                    "this run cannot resume: %s remembers %s, a %s",
                    self.name,
                    name,
                    type(value).__name__,
                )
                self._unsaved.add(name)
            else:
                memory.update(encoded)
        return memory


_MISSING = object()

_DP = (
    stock.DifferentialPrivacyClientSideAdaptiveClipping,
    stock.DifferentialPrivacyClientSideFixedClipping,
    stock.DifferentialPrivacyServerSideAdaptiveClipping,
    stock.DifferentialPrivacyServerSideFixedClipping,
)


def _refusal(inner: object) -> str:
    """Why a strategy cannot run here and what to change, or an empty string."""
    kind = type(inner).__name__
    typed = f"strategy._target_=...{kind}"
    if isinstance(inner, _DP):
        return (
            f"{typed}: its noise comes from a global generator that neither resumes nor is secret,"
            " and it weights clipped updates by token counts, which breaks the sensitivity; take"
            " another strategy and privacy=client"
        )
    if isinstance(inner, stock.FedXgbBagging | stock.FedXgbCyclic):
        return (
            f"{typed} aggregates decision trees, not the weights of a model; take strategy=fedavg"
            " or another"
        )
    if not isinstance(inner, stock.Strategy):
        return (
            f"{typed} is not a strategy of Flower (a subclass of flwr.serverapp.strategy.Strategy)"
        )
    if (fraction := getattr(inner, "fraction_train", 1.0)) != 1.0:
        return (
            f"strategy.fraction_train={fraction} has no effect here, only 1.0 is allowed; set"
            " pace.clients or pace.rate"
        )
    return ""


class _Nodes:
    """As much of a Grid as configure_train looks at: node ids, as many as it wants to see."""

    def __init__(self, nodes: Sequence[int], inner: stock.Strategy):
        wanted = max(getattr(inner, "min_available_nodes", 1), getattr(inner, "min_train_nodes", 1))
        # else it waits for nodes for ever
        self.nodes = [
            *nodes,
            *range(1, 1 + max(0, wanted - len(nodes))),
        ]

    def get_node_ids(self) -> list[int]:
        return self.nodes


@contextmanager
def _inside_a_run() -> Iterator[None]:
    """What Flower expects of a process that builds messages, put back afterwards.

    TaskIdentity must be set before a Message is made; configure_train samples from the global
    `random`; the strategies log each round at INFO, into our progress display; QFedAvg and Bulyan
    run the garbage collector for every reply (0.3 s each beside torch), so what lives now is kept
    out of its sight.
    """
    identity: Any = TaskIdentity
    kept = {name: getattr(identity, f"_{name}") for name in ("run_id", "task_id", "node_id")}
    logger = logging.getLogger("flwr")
    draws, level = random.getstate(), logger.level
    frozen = gc.get_freeze_count() == 0  # else somebody else's freeze would end with ours
    if frozen:
        gc.freeze()
    try:
        for name, value in kept.items():
            setattr(identity, name, 1 if value is None else value)
        logger.setLevel(max(level, logging.WARNING))
        yield
    finally:
        for name, value in kept.items():
            setattr(identity, name, value)
        logger.setLevel(level)
        random.setstate(draws)
        if frozen:
            gc.unfreeze()


def _plain(value: object) -> bool:
    """Whether an attribute can be copied and compared: data, or a function, which never changes."""
    return callable(value) or _data(value)


def _data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_data, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _data(item) for key, item in value.items())
    return value is None or isinstance(value, bool | Real | str | bytes | np.ndarray | ArrayRecord)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy, except of functions: a bound method would bring its object along."""
    return {
        name: value if callable(value) else copy.deepcopy(value)
        for name, value in attributes.items()
    }


def _same(one: Any, two: Any) -> bool:
    """Equality by type and bits."""
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes()
    if isinstance(one, ArrayRecord):
        return _same({k: a.numpy() for k, a in one.items()}, {k: a.numpy() for k, a in two.items()})
    if isinstance(one, dict):
        return list(one) == list(two) and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return one is two or bool(one == two)


def _arrays(value: Any) -> dict[str, np.ndarray] | None:
    """The arrays in one of the containers strategies use, by key, or None."""
    if isinstance(value, ArrayRecord):
        return {key: array.numpy() for key, array in value.items()}
    if isinstance(value, np.ndarray):
        return {"": value}
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if (
        isinstance(value, dict)
        and value
        and all(isinstance(item, np.ndarray) for item in value.values())
    ):
        return value
    return None


def _is_model(value: Any, params: np.ndarray) -> bool:
    arrays = _arrays(value)
    return arrays is not None and len(arrays) == 1 and _same(next(iter(arrays.values())), params)


def _holding(inner: stock.Strategy, params: np.ndarray) -> set[str]:
    """Attributes that are the global model."""
    return {name for name, value in vars(inner).items() if _is_model(value, params)}


_KINDS: dict[str, type] = {"record": ArrayRecord, "array": np.ndarray, "list": list, "dict": dict}


def _encode(name: str, value: Any) -> dict[str, np.ndarray] | None:
    """An attribute as named arrays: flower.<attribute>.<kind>.<key>; None where it is none of the
    known kinds.
    """
    if value is None:
        return {f"{MEMORY}.{name}.none.": np.zeros(0, np.float32)}
    # not the same as a number: it decides the dtype of what it is multiplied by
    if isinstance(value, np.generic):
        kind, arrays = "scalar", {"": np.asarray(value)}
    elif isinstance(value, bool | int | float):
        kind, arrays = "number", {"": np.asarray(value)}
    elif (arrays := _arrays(value)) is not None:
        kind = next(kind for kind, container in _KINDS.items() if isinstance(value, container))
    else:
        return None
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        return None
    return {f"{MEMORY}.{name}.{kind}.{key}": np.array(array) for key, array in arrays.items()}


def _decode(memory: dict[str, np.ndarray]) -> dict[str, Any]:
    """Attributes from what `_encode` made of them."""
    attributes: dict[str, Any] = {}
    # items of a list in their order
    for path in sorted(memory, key=lambda path: (len(path), path)):
        _, name, kind, key = path.split(".", 3)
        array = np.array(memory[path])  # strategies may write into it; the state stays as it is
        if kind == "none":
            attributes[name] = None
        elif kind == "number":
            attributes[name] = array.item()
        elif kind == "scalar":
            attributes[name] = array[()]
        elif kind == "array":
            attributes[name] = array
        elif kind == "list":
            attributes.setdefault(name, []).append(array)
        elif kind == "dict":
            attributes.setdefault(name, {})[key] = array
        else:
            attributes.setdefault(name, ArrayRecord())[key] = Array(array)
    return attributes
