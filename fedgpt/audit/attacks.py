"""`fedgpt audit`: attack the mechanism that a configuration names, through the code that a run
uses.

Three attacks. Canaries: units made to be found, in or out by a coin, against the claim for one
release (client) or one job (example). Membership: whether text that was trained on has a lower
loss. Token leak: whether one client's update tells which tokens its text has.
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgpt.aggregate.base import Strategy
from fedgpt.audit.statistics import Bounds, auc, bounds, rate_at
from fedgpt.core.device import choose_compute
from fedgpt.core.flat import frozen_weights
from fedgpt.core.messages import Job, Pacing, Plan, ServerState, Update
from fedgpt.core.options import PrivacyOptions, RunOptions
from fedgpt.data.batches import Batches, Blocks
from fedgpt.local.bookkeeping import BookKeeping
from fedgpt.local.private import PrivateSteps, example_losses
from fedgpt.local.trainer import Trainer
from fedgpt.model.build import freeze
from fedgpt.model.gpt import GPT
from fedgpt.privacy.accounting import gaussian_epsilon
from fedgpt.privacy.clipping import clipped
from fedgpt.privacy.plan import PrivacyPlan, sampling_probability
from fedgpt.privacy.randomness import SecureStream
from fedgpt.server.collector import UpdateCollector
from fedgpt.server.privacy import PaidByServer
from fedgpt.storage.checkpoint import RunTables

# privacy=client: random directions of which any two are nearly orthogonal
CANARIES, DIMENSIONS = (
    600,
    20_000,
)
# parameters with one row for each token, which token_leak looks at; the first that is trained
PER_TOKEN = ("transformer.wte.weight", "lm_head.weight")
BLOCKS, STEPS = 96, 8  # privacy=example: blocks of random tokens, all in every batch


@dataclass(frozen=True)
class Verdict:
    """An audit's bounds beside what was promised."""

    bounds: Bounds
    mu: float  # promised
    epsilon: float  # promised
    what: str

    @property
    def holds(self) -> bool:
        """Whether neither statistic refutes the promise."""
        return self.bounds.mu_bound <= self.mu and self.bounds.epsilon_bound <= self.epsilon


def audit_client(o: RunOptions, strategy: Strategy, plan: PrivacyPlan, seed: int = 0) -> Verdict:
    """Canary clients through intake and release: one version of a model of 20,000 zeros."""
    rng = np.random.default_rng(seed)
    inside = rng.random(CANARIES) < 0.5
    canaries = rng.standard_normal((CANARIES, DIMENSIONS), dtype=np.float32)
    canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        # a cohort of all canaries that are expected: what a build does with the sum, it does with
        # many
        alone = replace(plan, budget=None, cohort=CANARIES / 2)
        privacy = PaidByServer(o, alone, Path(folder), "audit", fresh=True)
        collector = UpdateCollector(o, strategy, DIMENSIONS, privacy)
        state = ServerState(np.zeros(DIMENSIONS, np.float32))
        collector.begin(state, (), CANARIES, 1)
        for i in np.flatnonzero(inside):
            # far longer than the clip, and some count for many tokens: neither may help a client to
            # be seen
            delta = canaries[i] * np.float32(1000 * o.privacy.clip)
            tokens = 1000 if i % 2 else 1
            update = Update(
                f"canary {i}", 0, 0, delta, tokens, {"update_norm": float(np.linalg.norm(delta))}
            )
            collector.add(update, Job(update.client, 0, 0, state.params, Plan("", 1, 0, 1, 1)), 0)
        pacing = Pacing(o.pace.name, CANARIES, max(1, round(plan.cohort)))
        released = -collector.step(state, pacing, None, RunTables("audit")).params
    mu = 1 / (plan.noise_multiplier * plan.scale)
    found = bounds(canaries @ released, inside, plan.delta)
    return Verdict(
        found, mu, gaussian_epsilon(mu, plan.delta), f"one release, {CANARIES} canary clients"
    )


def audit_example(o: RunOptions, vocab_size: int, plan: PrivacyPlan, seed: int = 0) -> Verdict:
    """Canary blocks of random tokens in one client's job: the attacker sees every step's noisy
    gradient.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=(BLOCKS, o.model.block_size + 1))
    inside = rng.random(BLOCKS) < 0.5
    trainer = _trainer(o, vocab_size)
    everything = Blocks(tokens.reshape(-1), o.model.block_size)
    there = Blocks(tokens[inside].reshape(-1), o.model.block_size)
    stream = SecureStream(secrets.token_bytes(32), "audit")
    steps = PrivateSteps(there, stream, 1.0, plan.noise_multiplier, o.privacy.clip)
    attacker, scores = _trainer(replace(o, privacy=PrivacyOptions()), vocab_size), np.zeros(BLOCKS)
    for _ in range(STEPS):
        before = trainer.params.clone()
        trainer.private.fill(trainer.grad, steps)
        attacker.params.copy_(before)
        own = _products(attacker, everything, o.privacy.clip, trainer.grad)
        scores += own - own.mean()
        trainer.optimizer.step(o.local.lr)
    mu = math.sqrt(STEPS) / plan.noise_multiplier
    found = bounds(scores, inside, plan.delta)
    return Verdict(
        found,
        mu,
        gaussian_epsilon(mu, plan.delta),
        f"{STEPS} steps, {BLOCKS} canary blocks, full batch",
    )


def membership(
    o: RunOptions, vocab_size: int, tokens: np.ndarray, plan: PrivacyPlan | None, steps: int
) -> dict[str, float]:
    """Train one client on every second of its blocks; how well a low loss tells those from the
    others.
    """
    width = o.model.block_size + 1
    blocks = np.asarray(tokens[: len(tokens) // (2 * width) * 2 * width]).reshape(-1, width)
    members, others = blocks[::2], blocks[1::2]
    trainer = _trainer(o, vocab_size)
    trainer.train(
        _start(o, vocab_size), _source(o, members.reshape(-1), plan), _plan(o, steps), None
    )
    told = [-_losses(trainer, part) for part in (members, others)]
    return {
        "auc": auc(told[0], told[1]),
        "tpr_at_1_percent_fpr": rate_at(told[0], told[1]),
        "blocks": float(len(members)),
    }


def token_leak(
    o: RunOptions, vocab_size: int, tokens: np.ndarray, plan: PrivacyPlan | None, steps: int
) -> dict[str, float]:
    """How well one update tells the tokens that it was trained on from those that its client's text
    does not have.

    AUC over the vocabulary. Under privacy=client also what a release tells to whoever knows all
    other updates in it: `released_auc`.
    """
    trainer, source = _trainer(o, vocab_size), _source(o, tokens, plan)
    seen, absent = np.zeros(vocab_size, bool), np.ones(vocab_size, bool)
    absent[np.unique(tokens)] = False
    with _watched(source, seen):
        delta = trainer.train(_start(o, vocab_size), source, _plan(o, steps), None).delta.copy()
    found = {
        "auc": _told_by(trainer, delta, seen, absent),
        "present": float(seen.sum()),
        "absent": float(absent.sum()),
    }
    if plan is not None and plan.unit == "client":
        noise = SecureStream(secrets.token_bytes(32), "audit").normal(delta.size)
        released = clipped(delta, o.privacy.clip) + noise * np.float32(
            plan.noise_multiplier * plan.scale * o.privacy.clip
        )
        found["released_auc"] = _told_by(trainer, released, seen, absent)
    return found


def _told_by(trainer: Trainer, delta: np.ndarray, seen: np.ndarray, absent: np.ndarray) -> float:
    """AUC of the rows of the embedding; seen and absent, (vocabulary,) bool."""
    views = trainer.layout.views(torch.from_numpy(delta))
    rows = views[next(name for name in PER_TOKEN if name in views)].numpy()
    # the head pushes the rows of all tokens that do not come one way; those that come are pulled
    # back
    scores = -(rows @ np.median(rows, axis=0))
    return auc(scores[seen], scores[absent])


@contextmanager
def _watched(source: Batches | PrivateSteps, seen: np.ndarray) -> Iterator[None]:
    """Mark in `seen` the tokens of whatever the source hands out."""
    owner, name = (source, "next") if isinstance(source, Batches) else (source.blocks, "take")
    handed = getattr(owner, name)

    def watched(*asked: Any) -> Any:
        batch = handed(*asked)
        for part in batch:
            seen[part.numpy()] = True
        return batch

    setattr(owner, name, watched)
    yield
    delattr(owner, name)


def _trainer(o: RunOptions, vocab_size: int) -> Trainer:
    compute = choose_compute(o.runtime.device, "fp32")
    fresh = GPT(o.model, vocab_size)
    freeze(fresh, o.model.trainable)
    base = frozen_weights(fresh)
    return Trainer(o.model, vocab_size, o.local, compute, o.privacy.engine, base)


def _start(o: RunOptions, vocab_size: int) -> np.ndarray:
    """The weights of a fresh model."""
    return _trainer(o, vocab_size).params.cpu().numpy().copy()


def _plan(o: RunOptions, steps: int) -> Plan:
    step_tokens = o.local.accumulate * o.local.batch_size * o.model.block_size
    return Plan("audit", steps, 0, step_tokens, steps * step_tokens)


def _source(o: RunOptions, tokens: np.ndarray, plan: PrivacyPlan | None) -> Batches | PrivateSteps:
    if plan is None or plan.unit != "example":
        return Batches(tokens, o.model.block_size, o.local.batch_size, seed=0)
    blocks = Blocks(tokens, o.model.block_size)
    stream = SecureStream(secrets.token_bytes(32), "audit")
    return PrivateSteps(
        blocks, stream, sampling_probability(o, len(blocks)), plan.noise_multiplier, o.privacy.clip
    )


def _products(attacker: Trainer, blocks: Blocks, clip: float, released: torch.Tensor) -> np.ndarray:
    """(blocks,): the clipped gradient of each, as the attacker makes it, times what was
    released.
    """
    book, found = BookKeeping(attacker.model, attacker.layout), []
    for part in np.array_split(
        np.arange(len(blocks)), -(-len(blocks) // attacker.private.examples)
    ):
        inputs, targets = blocks.take(part)
        rows, _ = book.gradients(lambda x=inputs, y=targets: example_losses(attacker.model, x, y))
        whole = torch.cat([rows[name].flatten(1) for name in attacker.layout.names], 1)
        factors = (clip / whole.norm(dim=1)).clamp(max=1.0)
        found.append((factors * (whole @ released)).cpu().numpy())
    return np.concatenate(found)


@torch.no_grad()
def _losses(trainer: Trainer, blocks: np.ndarray) -> np.ndarray:
    found: list[Any] = []
    for part in np.array_split(
        torch.from_numpy(blocks.astype(np.int64)), max(1, len(blocks) // 32)
    ):
        ids = torch.as_tensor(part)
        found.append(example_losses(trainer.model, ids[:, :-1], ids[:, 1:]).numpy())
    return np.concatenate(found)
