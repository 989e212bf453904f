"""Cohorts of updates for the tests of strategies, and one server step on them."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import torch

import fedgpt.aggregate
from fedgpt.aggregate.base import Strategy
from fedgpt.aggregate.exact import ExactSum
from fedgpt.core.messages import Pacing, ServerState, Update


def descendants(cls):
    """A class and all its subclasses."""
    return {cls}.union(*(descendants(subclass) for subclass in cls.__subclasses__()))


def every_strategy():
    """All classes in fedgpt.aggregate that are strategies, except for the base class."""
    package = fedgpt.aggregate
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    base = Strategy.__module__  # also where the toy rules of its docstring are
    ours = {c for c in descendants(Strategy) if c.__module__.startswith(package.__name__)}
    return sorted((c for c in ours if c.__module__ != base), key=lambda c: c.__name__)


def updates(n=5, size=40, seed=0, scale=0.01):
    """Random float32 updates of n clients with different numbers of tokens."""
    rng = np.random.default_rng(seed)
    deltas = (rng.standard_normal((n, size)) * scale).astype(np.float32)
    return [
        Update(f"client{i}", 0, 0, delta, int(rng.integers(1, 1000)))
        for i, delta in enumerate(deltas)
    ]


def update_of(*rows, dtype=np.float64):
    """One update for each row, from clients in that order."""
    return [
        Update(f"client{i:02}", 0, 0, np.atleast_1d(np.asarray(row, dtype)), 1)
        for i, row in enumerate(rows)
    ]


def start(size=40, dtype=np.float32, seed=1):
    """A state with random parameters and empty memory."""
    return ServerState((np.random.default_rng(seed).standard_normal(size) * 0.02).astype(dtype))


def root_of(cohort):
    """An update of the server itself: the mean of the cohort, in any order."""
    ordered = sorted(cohort, key=lambda update: update.client)
    mean = np.mean([update.delta for update in ordered], axis=0, dtype=np.float64)
    return Update("server", 0, 0, mean.astype(ordered[0].delta.dtype), 1)


def ready(strategy, cohort, state):
    """The cohort as updates of clients that started from this state, with `base` if needed."""
    base = state.params if strategy.needs_base else None
    return [replace(update, version=state.version, base=base) for update in cohort]


def d_of(strategy, cohort, state, pacing=None):
    """D of a cohort, computed as the server does, in the given order."""
    if not strategy.linear:
        root = root_of(cohort) if strategy.needs_root else None
        return strategy.combine(ready(strategy, cohort, state), state, root)
    weights = [strategy.weight(update, 0) for update in cohort]
    total = ExactSum(state.params.size, bound=1.0, count=len(cohort), max_weight=max(weights))
    for update, weight in zip(cohort, weights, strict=True):
        total.add(update.delta, weight)
    pacing = pacing or Pacing("cohort", len(cohort), len(cohort))
    return total.mean(strategy.divisor(weights, pacing))


def turn(strategy, cohort, state, pacing=None):
    """The state after one server step with this cohort."""
    d = d_of(strategy, cohort, state, pacing)
    remembered = {} if strategy.linear else strategy.remember(ready(strategy, cohort, state), state)
    return strategy.step(d, replace(state, memory={**state.memory, **remembered}))


def run(strategy, ds, state):
    """The parameters after each step."""
    history = []
    for d in ds:
        state = strategy.step(d, state)
        history.append(state.params)
    return history


def eight_gradients():
    """Eight fixed gradients of five numbers: (8, 5) float64."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(8)]
    return torch.stack(rows).numpy()


def torch_history(optimizer, ds):
    """The parameters after each step of a torch optimiser, from zeros."""
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    opt, history = optimizer([theta]), []
    for d in ds:
        theta.grad = torch.from_numpy(d.copy())
        opt.step()
        history.append(theta.detach().numpy().copy())
    return history
