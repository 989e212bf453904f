"""Attacks on the privacy mechanism of a configuration, through the code that a run uses.

Canaries test the guarantee: a coin flip decides whether an easily detected unit takes part, and an
attacker guesses which units did. Too many correct guesses refute the guaranteed mu and epsilon of
one release (privacy=client) or one job (privacy=example). The other two attacks measure leaks, with
and without privacy. Membership: does text that a model was trained on have a lower loss than other
text? Token leak: does one client's update reveal which tokens its text contains?
"""

from __future__ import annotations

import math
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgpt.aggregate.base import Strategy
from fedgpt.audit.problems import PER_TOKEN, audit_problems
from fedgpt.audit.statistics import Bounds, auc, bounds, rate_at
from fedgpt.core.device import choose_compute
from fedgpt.core.errors import ConfigError
from fedgpt.core.flat import frozen_weights
from fedgpt.core.messages import Job, Pacing, Plan, ServerState, Update
from fedgpt.core.notices import saying
from fedgpt.core.options import PrivacyOptions, RunOptions
from fedgpt.data.batches import Batches, Blocks
from fedgpt.data.partition import Shard
from fedgpt.data.prepare import Prepared
from fedgpt.local.bookkeeping import BookKeeping
from fedgpt.local.private import PrivateSteps
from fedgpt.local.trainer import Trainer
from fedgpt.model.build import freeze
from fedgpt.model.gpt import GPT
from fedgpt.privacy.accounting import gaussian_epsilon
from fedgpt.privacy.clipping import clipped
from fedgpt.privacy.plan import PrivacyPlan, make_plan, sampling_probability
from fedgpt.privacy.randomness import SecureStream
from fedgpt.server.collector import Collectors
from fedgpt.server.privacy import PaidByServer
from fedgpt.storage.tables import Clients

# privacy=client: number of canary clients, and number of parameters of the model; in so many
# dimensions any two of the random canary updates are nearly orthogonal
CANARIES, DIMENSIONS = 600, 20_000
# parameters with one row per token; the token-leak attack uses the first of them that is trained
# privacy=example: number of canary blocks (random tokens, all in every batch), and of local steps
BLOCKS, STEPS = 96, 8
# membership: number of local steps, enough for a small model to memorise some of a client's text
MEMBER_STEPS = 300


@dataclass(frozen=True)
class Verdict:
    """The bounds that canaries prove, and the guarantee."""

    bounds: Bounds
    mu: float  # guaranteed mu
    delta: float
    what: str  # what was attacked, in words

    @property
    def epsilon(self) -> float:
        """The guaranteed epsilon, computed from mu."""
        return gaussian_epsilon(self.mu, self.delta)

    @property
    def holds(self) -> bool:
        """Whether neither bound exceeds the guarantee."""
        return self.bounds.mu_bound <= self.mu and self.bounds.epsilon_bound <= self.epsilon


@dataclass(frozen=True)
class Findings:
    """The results of all attacks on a configuration."""

    unit: str  # privacy.unit
    canaries: Verdict | None  # None without privacy
    client: str  # the client whose text membership and token leak are about
    member_steps: int  # local steps of the model in membership
    leak_steps: int  # local steps of the update in token leak
    membership: dict[str, float]  # see `membership`
    token_leak: dict[str, float]  # see `token_leak`

    @property
    def holds(self) -> bool:
        """Whether no attack refuted the guarantee."""
        return self.canaries is None or self.canaries.holds


def audit(
    o: RunOptions, strategy: Strategy, prepared: Prepared, shards: Sequence[Shard]
) -> Findings:
    """All attacks; raises ConfigError if the configuration has no mechanism to attack."""
    if problems := list(audit_problems(o)):
        raise ConfigError(problems)
    plan = None
    if o.privacy.unit != "none":
        with saying("computing the noise"):
            plan = make_plan(o, [shard.size for shard in shards])
    vocab_size = prepared.tokenizer.vocab_size
    verdict = None
    if plan is not None:
        client = plan.unit == "client"
        with saying(f"looking for canary {'clients' if client else 'blocks'} (1 of 3 attacks)"):
            verdict = (
                audit_client(o, strategy, plan) if client else audit_example(o, vocab_size, plan)
            )
    # the client with the median size represents the others
    shard = sorted(shards, key=lambda s: s.size)[len(shards) // 2]
    tokens = shard.read(prepared.tokens)
    with saying(f"training on half of the blocks of {shard.client} (2 of 3 attacks)"):
        members = membership(o, vocab_size, tokens, plan, MEMBER_STEPS)
    with saying(f"looking for the tokens of {shard.client} in an update (3 of 3 attacks)"):
        leak = token_leak(o, vocab_size, tokens, plan, o.local.steps)
    return Findings(
        o.privacy.unit, verdict, shard.client, MEMBER_STEPS, o.local.steps, members, leak
    )


def audit_client(o: RunOptions, strategy: Strategy, plan: PrivacyPlan, seed: int = 0) -> Verdict:
    """Canary clients in one release of the server: one version of a model of 20,000 zeros."""
    rng = np.random.default_rng(seed)
    inside = rng.random(CANARIES) < 0.5
    canaries = rng.standard_normal((CANARIES, DIMENSIONS), dtype=np.float32)
    canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        # a cohort of as many canaries as are expected to take part, so that a mistake in how the
        # server treats the sum is seen on many updates
        alone = replace(plan, budget=None, cohort=CANARIES / 2)
        privacy = PaidByServer(o, alone, Path(folder), "audit", fresh=True)
        state = ServerState(np.zeros(DIMENSIONS, np.float32))
        collectors = Collectors(o, strategy, privacy, DIMENSIONS, "audit")
        collector = collectors.open(state, (), CANARIES, Clients())
        for i in np.flatnonzero(inside):
            # much longer than the clip, half of them with many tokens: neither may make a client
            # easier to detect
            delta = canaries[i] * np.float32(1000 * o.privacy.clip)
            tokens = 1000 if i % 2 else 1
            norm = {"update_norm": float(np.linalg.norm(delta))}
            update = Update(f"canary {i}", 0, 0, delta, tokens, norm)
            collector.add(update, Job(update.client, 0, 0, state.params, Plan("", 1, 0, 1, 1)), 0)
        pacing = Pacing(o.pace.name, CANARIES, max(1, round(plan.cohort)))
        released = -collector.step(state, pacing).params
    mu = 1 / (plan.noise_multiplier * plan.scale)
    found = bounds(canaries @ released, inside, plan.delta)
    return Verdict(found, mu, plan.delta, f"one release, {CANARIES} canary clients")


def audit_example(o: RunOptions, vocab_size: int, plan: PrivacyPlan, seed: int = 0) -> Verdict:
    """Canary blocks of random tokens in one client's job.

    The attacker sees the noisy gradient of every step. A block's score is the product of its own
    gradient and the noisy one, summed over the steps.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(vocab_size, size=(BLOCKS, o.model.block_size + 1))
    inside = rng.random(BLOCKS) < 0.5
    trainer = _trainer(o, vocab_size)
    everything = Blocks(tokens.reshape(-1), o.model.block_size)
    trained = Blocks(tokens[inside].reshape(-1), o.model.block_size)
    stream = SecureStream(secrets.token_bytes(32), "audit")
    steps = PrivateSteps(trained, stream, 1.0, plan.noise_multiplier, o.privacy.clip)
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
    return Verdict(found, mu, plan.delta, f"{STEPS} steps, {BLOCKS} canary blocks, full batch")


def membership(
    o: RunOptions, vocab_size: int, tokens: np.ndarray, plan: PrivacyPlan | None, steps: int
) -> dict[str, float]:
    """Train one client on every second block; measure how well the loss separates trained blocks.

    Returns "auc", "tpr_at_1_percent_fpr" (share of the trained blocks found at 1 % false positives)
    and "blocks" (number of trained blocks). Raises ConfigError for fewer than two blocks.
    """
    width = o.model.block_size + 1
    blocks = np.asarray(tokens[: len(tokens) // (2 * width) * 2 * width]).reshape(-1, width)
    if len(blocks) < 2:
        raise ConfigError(
            f"model.block_size={o.model.block_size}: the client with the median size has"
            f" {len(tokens)} tokens, and fedgpt audit trains on one of two blocks of {width}; lower"
            " it, or set partition=iid with fewer partition.clients"
        )
    members, others = blocks[::2], blocks[1::2]
    trainer = _trainer(o, vocab_size)
    trainer.train(
        _start(o, vocab_size), _source(o, members.reshape(-1), plan), _plan(o, steps), None
    )
    inside, outside = (-_losses(trainer, part) for part in (members, others))
    return {
        "auc": auc(inside, outside),
        "tpr_at_1_percent_fpr": rate_at(inside, outside),
        "blocks": float(len(members)),
    }


def token_leak(
    o: RunOptions, vocab_size: int, tokens: np.ndarray, plan: PrivacyPlan | None, steps: int
) -> dict[str, float]:
    """Measure how well one update separates tokens that it was trained on from tokens not in the
    text.

    Returns "auc" over the vocabulary, and the numbers of tokens: "present" in the batches and
    "absent" from the text. Under privacy=client also "released_auc", for an attacker who sees the
    release and knows all other updates in it.
    """
    trainer, source = _trainer(o, vocab_size), _source(o, tokens, plan)
    seen, absent = np.zeros(vocab_size, bool), np.ones(vocab_size, bool)
    absent[np.unique(tokens)] = False
    with _recorded(source, seen):
        delta = trainer.train(_start(o, vocab_size), source, _plan(o, steps), None).delta.copy()
    found = {
        "auc": _leak_auc(trainer, delta, seen, absent),
        "present": float(seen.sum()),
        "absent": float(absent.sum()),
    }
    if plan is not None and plan.unit == "client":
        noise = SecureStream(secrets.token_bytes(32), "audit").normal(delta.size)
        released = clipped(delta, o.privacy.clip) + noise * np.float32(
            plan.noise_multiplier * plan.scale * o.privacy.clip
        )
        found["released_auc"] = _leak_auc(trainer, released, seen, absent)
    return found


def _leak_auc(trainer: Trainer, delta: np.ndarray, seen: np.ndarray, absent: np.ndarray) -> float:
    """AUC of a score for each row of the embedding; seen and absent are (vocabulary,) bool."""
    views = trainer.layout.views(torch.from_numpy(delta))
    rows = views[next(name for name in PER_TOKEN if name in views)].numpy()
    # the output layer shares the embedding: its gradient pushes the rows of all tokens that do not
    # occur in the same direction, and pulls the rows of those that occur back
    scores = -(rows @ np.median(rows, axis=0))
    return auc(scores[seen], scores[absent])


@contextmanager
def _recorded(source: Batches | PrivateSteps, seen: np.ndarray) -> Iterator[None]:
    """Mark in `seen` the tokens of all batches that the source returns."""
    owner, name = (source, "next") if isinstance(source, Batches) else (source.units, "take")
    original = getattr(owner, name)

    def recorded(*arguments: Any) -> Any:
        batch = original(*arguments)
        for part in batch:
            seen[part.numpy()] = True
        return batch

    setattr(owner, name, recorded)
    yield
    delattr(owner, name)


def _trainer(o: RunOptions, vocab_size: int) -> Trainer:
    compute = choose_compute(o.runtime.device, "fp32")
    fresh = GPT(o.model, vocab_size)
    freeze(fresh, o.model.trainable)
    base = frozen_weights(fresh)
    return Trainer(o.model, vocab_size, o.local, compute, o.privacy.engine, base=base)


def _start(o: RunOptions, vocab_size: int) -> np.ndarray:
    """The weights of a new model."""
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
    """(blocks,): the product of each block's clipped gradient and the released gradient."""
    book, found = BookKeeping(attacker.model, attacker.layout), []
    for part in np.array_split(
        np.arange(len(blocks)), -(-len(blocks) // attacker.private.examples)
    ):
        rows, _ = book.gradients(attacker.private.losses_of(blocks.take(part)))
        flat = torch.cat([rows[name].flatten(1) for name in attacker.layout.names], 1)
        factors = (clip / flat.norm(dim=1)).clamp(max=1.0)
        found.append((factors * (flat @ released)).cpu().numpy())
    return np.concatenate(found)


@torch.no_grad()
def _losses(trainer: Trainer, blocks: np.ndarray) -> np.ndarray:
    """(blocks,): the mean loss of each block."""
    found: list[Any] = []
    for part in np.array_split(
        torch.from_numpy(blocks.astype(np.int64)), max(1, len(blocks) // 32)
    ):
        ids = torch.as_tensor(part)
        found.append(trainer.private.losses_of((ids[:, :-1], ids[:, 1:]))().numpy())
    return np.concatenate(found)
