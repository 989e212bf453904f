"""Flower's strategies (`flwr.serverapp.strategy.*`) as strategies of our server.

A server step becomes one round of Flower: `configure_train`, in which a strategy gets the global
arrays, then `aggregate_train` with replies that contain the clients' weights, in the order of the
client ids. Sampling, deadlines and validation remain in fedgpt's server. The strategy's attributes
are stored in `state.memory` between rounds (strategy_memory.py). So each step depends only on the
updates and the state, and a resumed run gives the same bits.
"""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from fedgpt.flower.strategy_memory import (
    MEMORY,
    copied,
    decode,
    encode,
    is_model,
    is_plain,
    models_in,
    same,
)

log = logging.getLogger(__name__)

ARRAY = "params"  # key of the only array in every record


class Replacement(np.ndarray):
    """params - next of a strategy that computes the next model itself, with the next state.

    In floating point, params - (params - next) does not give the bits of `next`. So `step` returns
    the state that is attached here.
    """

    state: ServerState  # the next state


@dataclass(frozen=True, eq=False)
class FlowerStrategy(Strategy):
    """Runs any strategy of Flower that averages arrays; with cohort pacing only.

    `pace` decides which clients take part: min_*_nodes and fraction_evaluate have no effect. The
    strategy gets each metric that all updates of a step have, under the same name. Its weight of a
    client (`num-examples`) is the number of tokens trained.
    """

    inner: stock.Strategy
    # attributes of a new strategy that can be copied and compared
    _fresh: dict[str, Any] = field(init=False, repr=False)
    _unsaved: set[str] = field(init=False, repr=False)  # attributes that no checkpoint can store

    def __post_init__(self) -> None:
        if problem := _refusal(self.inner):
            raise ConfigError(problem)
        attributes = vars(self.inner)
        plain = {name: value for name, value in attributes.items() if is_plain(value)}
        object.__setattr__(self, "_fresh", copied(plain))
        object.__setattr__(self, "_unsaved", set(attributes) - set(plain))

    @property
    def name(self) -> str:
        """`flower.` and the name of the strategy's class."""
        return f"flower.{type(self.inner).__name__}"

    @property
    def unsaved(self) -> tuple[str, ...]:
        """Attributes that a checkpoint cannot store; some are known only after the first step."""
        return tuple(sorted(self._unsaved))

    def client_numbers(self) -> dict[str, float]:
        """FedProx's factor, under its name in fedgpt."""
        mu = getattr(self.inner, "proximal_mu", None)
        return {} if mu is None else {"proximal_mu": float(mu)}

    def combine(
        self, updates: Sequence[Update], state: ServerState, root: Update | None = None
    ) -> np.ndarray:
        """One round of the strategy; raises FedGPTError if it fails or its model is not finite.

        If the strategy skips the round (no update, or too few for Bulyan), the parameters stay the
        same.
        """
        updates = sorted(updates, key=lambda update: (update.client, update.number))
        # the same ids in all rounds and after a restart
        nodes = [derive_seed(0, "node", update.client) for update in updates]
        record = ArrayRecord({ARRAY: Array(state.params)})
        self._restore(state.memory)
        try:
            with _inside_a_run():
                requests = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes]
                grid = cast(Grid, _Nodes(nodes, self.inner))
                list(self.inner.configure_train(state.version + 1, record, ConfigRecord(), grid))
                learned = models_in(self.inner, state.params)
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
        """The state that `combine` computed; `d` must be its unchanged result."""
        if not isinstance(d, Replacement) or not hasattr(d, "state"):
            raise TypeError(f"{self.name} steps only on the result of its own combine")
        return d.state

    def _contents(self, updates: Sequence[Update], state: ServerState) -> Iterator[RecordDict]:
        """Replies as Flower's clients send them: the weights base - delta, and metrics."""
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
        """The strategy's model as float32 (FedAdam's is float64); raises FedGPTError."""
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
        """Give the strategy exactly the attributes that it had after the last step."""
        for name in set(vars(self.inner)) - self._unsaved:
            delattr(self.inner, name)
        vars(self.inner).update(
            copied({n: v for n, v in self._fresh.items() if n not in self._unsaved})
        )
        vars(self.inner).update(decode(memory))

    def _memory(
        self, before: np.ndarray, after: np.ndarray, learned: set[str]
    ) -> dict[str, np.ndarray]:
        """Attributes that differ from those of a new strategy, as arrays by name.

        A copy of the global model that configure_train sets again each round is left out: it is as
        large as the model.
        """
        memory: dict[str, np.ndarray] = {}
        for name, value in vars(self.inner).items():
            fresh = self._fresh.get(name, _MISSING)
            if name in self._unsaved or same(value, fresh):
                continue
            emptied = isinstance(value, ArrayRecord | list | dict) and not value
            if name in learned and (emptied or is_model(value, before) or is_model(value, after)):
                continue
            encoded = encode(name, value)
            if encoded is None:
                log.warning(
                    "this run cannot be resumed: %s remembers %s, a %s",
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
    """Why a strategy cannot run here and what to change; an empty string if it can."""
    kind = type(inner).__name__
    typed = f"strategy._target_=...{kind}"
    if isinstance(inner, _DP):
        return (
            f"{typed}: its noise comes from a global generator, which is not secret and cannot be"
            " resumed, and it weights clipped updates by token counts, which breaks the"
            " sensitivity; take another strategy and privacy=client"
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
    """The part of a Grid that configure_train uses: node ids, at least as many as it waits for."""

    def __init__(self, nodes: Sequence[int], inner: stock.Strategy):
        wanted = max(getattr(inner, "min_available_nodes", 1), getattr(inner, "min_train_nodes", 1))
        # with fewer nodes configure_train would wait forever
        self.nodes = [*nodes, *range(1, 1 + max(0, wanted - len(nodes)))]

    def get_node_ids(self) -> list[int]:
        return self.nodes


@contextmanager
def _inside_a_run() -> Iterator[None]:
    """Set the global state that Flower's strategies need, and restore it afterwards.

    TaskIdentity must be set before a Message is made. configure_train draws from the global
    `random`. The strategies log each round at INFO, which would break our progress display. QFedAvg
    and Bulyan run the garbage collector for every reply, which takes 0.3 s each after torch is
    imported; `gc.freeze` excludes all present objects from it.
    """
    identity: Any = TaskIdentity
    kept = {name: getattr(identity, f"_{name}") for name in ("run_id", "task_id", "node_id")}
    logger = logging.getLogger("flwr")
    draws, level = random.getstate(), logger.level
    frozen = gc.get_freeze_count() == 0  # otherwise unfreeze would end another freeze
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
