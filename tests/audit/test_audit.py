"""`fedgpt audit`: correct mechanisms pass, broken ones do not, and leaks are measured."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from support import mechanism as m

from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.audit.attacks import (
    Verdict,
    audit,
    audit_client,
    audit_example,
    membership,
    token_leak,
)
from fedgpt.audit.statistics import Bounds
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import (
    LocalOptions,
    ModelOptions,
    PaceOptions,
    PrivacyOptions,
    RunOptions,
    TaskOptions,
)
from fedgpt.privacy.accounting import Event
from fedgpt.privacy.plan import PrivacyPlan

# broken mechanisms of privacy=client, which all claim mu 0.5 (epsilon about 2)
BROKEN = {
    "no noise": m.no_noise,
    "a tenth of the noise": lambda: m.noise_times(0.1),
    "noise divided twice": m.noise_divided_twice,
    "not clipped": m.not_clipped,
    "clipped after averaging": m.clipped_after_averaging,
    "clipped by layer": m.clipped_by_layer,
    "weighted by tokens": lambda: m.weighted_by_tokens(10.0),
    "clip twice as large": lambda: m.clipped_to(2.0),
    "noise a fifth too small": lambda: m.noise_times(0.8),
}


def client_audit(seed: int = 0):
    return audit_client(m.options(noise_multiplier=2.0), FedAvg(), m.plan(2.0), seed)


def test_a_correct_server_passes():
    """The noise is random, so one audit in a hundred may fail; three of three would be a defect."""
    found = [client_audit(seed) for seed in range(3)]
    assert any(verdict.holds for verdict in found)
    assert found[0].mu == 0.5 and found[0].epsilon < 2.3
    assert all(verdict.bounds.mu_bound < 0.8 for verdict in found)


@pytest.mark.parametrize(
    ("mu", "epsilon", "holds"), [(0.9, 4.0, True), (1.1, 4.0, False), (0.9, 4.5, False)]
)
def test_each_of_the_two_bounds_can_refute_the_guarantee(mu, epsilon, holds):
    """A mu of 1 is an epsilon of 4.38 at a delta of 1e-5."""
    assert Verdict(Bounds(mu + 0.2, mu, epsilon), 1.0, 1e-5, "a release").holds == holds


def test_at_least_eight_of_nine_broken_servers_fail():
    caught = set()
    for name, broken in BROKEN.items():
        with broken():
            if not client_audit().holds:
                caught.add(name)
    assert len(caught) >= 8, set(BROKEN) - caught
    assert "noise a fifth too small" in BROKEN.keys() - caught or len(caught) == 9


TINY = ModelOptions(n_layer=2, n_head=2, n_embd=32, block_size=16, positions="learned")
VOCAB = 64


def tiny(**privacy) -> tuple[RunOptions, PrivacyPlan]:
    chosen = PrivacyOptions(**{"unit": "example", "noise_multiplier": 2.0, "clip": 0.5, **privacy})
    o = RunOptions(
        model=TINY,
        pace=PaceOptions(clients=0),
        local=LocalOptions(steps=8, batch_size=16, lr=3e-3),
        privacy=chosen,
    )
    event = Event(float(chosen.noise_multiplier or 0), 1.0, 8)
    return o, PrivacyPlan("example", "poisson", event, 1e-5, None, 96, 1, 1.0)


@contextmanager
def no_clip():
    from fedgpt.local.bookkeeping import BookKeeping

    correct = BookKeeping.add_clipped

    def add_clipped(self, losses, clip, total):
        return correct(self, losses, 1e9, total)

    with m.patched("fedgpt.local.bookkeeping.BookKeeping.add_clipped", add_clipped):
        yield


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_correct_client_passes(engine):
    o, plan = tiny(engine=engine)
    found = [audit_example(o, VOCAB, plan, seed) for seed in range(2)]
    assert any(verdict.holds for verdict in found)
    assert found[0].mu == pytest.approx(8**0.5 / 2) and "96 canary blocks" in found[0].what


@pytest.mark.parametrize(
    "broken",
    [m.no_noise, lambda: m.noise_times(0.25), no_clip],
    ids=["no noise", "a quarter of the noise", "no clip"],
)
def test_a_broken_client_fails(broken):
    """One audit in fifteen misses a quarter of the noise; four in a row do not."""
    o, plan = tiny()
    with broken():
        assert not all(audit_example(o, VOCAB, plan, seed).holds for seed in range(4))


def text(seed: int, words: int, length: int) -> np.ndarray:
    """A text that uses some tokens of the vocabulary often and others never."""
    rng = np.random.default_rng(seed)
    known = rng.choice(VOCAB, size=words, replace=False)
    return known[rng.zipf(1.5, size=length) % words]


def test_one_update_reveals_its_tokens_and_a_private_one_does_not():
    o, plan = tiny(clip=1.0)
    tokens = text(0, 32, 200 * 17)
    assert token_leak(o, VOCAB, tokens, None, 8)["auc"] > 0.9
    found = [
        token_leak(o, VOCAB, tokens, replace(plan, planned=Event(1.0, 1.0, 8)), 8)["auc"]
        for _ in range(5)
    ]
    assert np.mean(found) < 0.62, "close to a random order"


def test_a_release_does_not_reveal_the_tokens_that_the_server_sees():
    o, _ = tiny()
    o = replace(o, privacy=PrivacyOptions(unit="client", clip=1.0))
    tokens = text(0, 32, 200 * 17)
    found = [token_leak(o, VOCAB, tokens, m.plan(2.0), 8) for _ in range(4)]
    assert min(each["auc"] for each in found) > 0.9
    assert np.mean([each["released_auc"] for each in found]) < 0.65, "close to a random order"


def test_members_are_found_if_the_model_has_memorised_its_text():
    """The noise is random: one AUC is 0.61 with a standard deviation of 0.07 (eight runs)."""
    o, plan = tiny()
    o = replace(o, local=LocalOptions(steps=8, batch_size=16, lr=1e-2))
    tokens = np.random.default_rng(0).integers(
        VOCAB, size=40 * 17
    )  # random text can only be memorised
    assert membership(o, VOCAB, tokens, None, 300)["auc"] > 0.9
    noisy = replace(plan, planned=Event(30.0, 1.0, 300))
    hidden = [membership(o, VOCAB, tokens, noisy, 300) for _ in range(4)]
    assert np.mean([each["auc"] for each in hidden]) < 0.75 and hidden[0]["blocks"] == 20


def test_a_client_with_a_single_block_cannot_be_attacked():
    """One block is trained on and another is not; a remedy of the message helps."""
    o, plan = tiny()
    tokens = text(0, 8, 2 * 17 - 1)
    with pytest.raises(ConfigError, match=r"model\.block_size=16: the client with the median size"):
        membership(o, VOCAB, tokens, plan, 1)
    shorter = replace(o, model=replace(TINY, block_size=8))
    assert membership(shorter, VOCAB, tokens, None, 1)["blocks"] == 1


def test_another_task_than_language_modelling_is_refused():
    o, _ = tiny()
    o = replace(o, task=TaskOptions("custom", "support.labels_task.DocumentLabel"))
    with pytest.raises(ConfigError, match="task=custom: fedgpt audit plants text"):
        audit(o, FedAvg(), None, [])
