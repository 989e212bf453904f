"""Cohorts of updates for the tests of strategies, and what the engine does with them."""

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
    return (
        {cls}.union(*(descendants(sub) for sub in cls.__subclasses__()))
        if cls.__subclasses__()
        else {cls}
    )


def every_strategy():
    package = fedgpt.aggregate
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    found = descendants(Strategy) - {Strategy}
    return sorted(
        (c for c in found if c.__module__.startswith(package.__name__)), key=lambda c: c.__name__
    )


def updates(n=5, size=40, seed=0, scale=0.01):
    rng = np.random.default_rng(seed)
    deltas = (rng.standard_normal((n, size)) * scale).astype(np.float32)
    return [
        Update(f"client{i}", 0, 0, delta, int(rng.integers(1, 1000)))
        for i, delta in enumerate(deltas)
    ]


def update_of(*rows, dtype=np.float64):
    """One update per row, of clients in that order."""
    return [
        Update(f"client{i:02}", 0, 0, np.atleast_1d(np.asarray(row, dtype)), 1)
        for i, row in enumerate(rows)
    ]


def start(size=40, dtype=np.float32, seed=1):
    return ServerState((np.random.default_rng(seed).standard_normal(size) * 0.02).astype(dtype))


def root_of(cohort):
    """A server's own update: the cohort's mean, whatever the order."""
    ordered = sorted(cohort, key=lambda update: update.client)
    mean = np.mean([update.delta for update in ordered], axis=0, dtype=np.float64)
    return Update("server", 0, 0, mean.astype(ordered[0].delta.dtype), 1)


def ready(strategy, cohort, state):
    """The updates of clients that started from this state, with what the strategy asks for."""
    base = state.params if strategy.needs_base else None
    return [replace(update, version=state.version, base=base) for update in cohort]


def d_of(strategy, cohort, state, pacing=None):
    """What the engine does with a cohort, in the order it is given."""
    if not strategy.linear:
        return strategy.combine(
            ready(strategy, cohort, state), state, root_of(cohort) if strategy.needs_root else None
        )
    weights = [strategy.weight(update, 0) for update in cohort]
    total = ExactSum(state.params.size, bound=1.0, count=len(cohort), max_weight=max(weights))
    for update, weight in zip(cohort, weights, strict=True):
        total.add(update.delta, weight)
    return total.mean(
        strategy.divisor(weights, pacing or Pacing("cohort", len(cohort), len(cohort)))
    )


def turn(strategy, cohort, state, pacing=None):
    """One server step: the state after this cohort."""
    d = d_of(strategy, cohort, state, pacing)
    remembered = {} if strategy.linear else strategy.remember(ready(strategy, cohort, state), state)
    return strategy.step(d, replace(state, memory={**state.memory, **remembered}))


def run(strategy, ds, state):
    """Parameters after each step."""
    history = []
    for d in ds:
        state = strategy.step(d, state)
        history.append(state.params)
    return history


def setup_e():
    """Eight gradients of five numbers, drawn one after the other: the note's numbers are of
    these.
    """
    generator = torch.Generator().manual_seed(0)
    return np.stack(
        [torch.randn(5, generator=generator, dtype=torch.float64).numpy() for _ in range(8)]
    )


def torch_history(optimizer, ds):
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    opt, history = optimizer([theta]), []
    for d in ds:
        theta.grad = torch.from_numpy(d.copy())
        opt.step()
        history.append(theta.detach().numpy().copy())
    return history
