"""`fedgpt audit`: right builds pass it, broken ones do not, and what a model leaks is seen."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from support import mechanism as m

from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.audit.attacks import audit_client, audit_example, membership, token_leak
from fedgpt.core.options import LocalOptions, ModelOptions, PaceOptions, PrivacyOptions, RunOptions
from fedgpt.privacy.accounting import Event
from fedgpt.privacy.plan import PrivacyPlan

# as reference/privacy's table: claim mu 0.5, epsilon about 2
CLIENT = {
    "no noise": m.no_noise, "a tenth of the noise": lambda: m.noise_times(0.1),
    "noise divided twice": m.noise_divided_twice, "not clipped": m.not_clipped,
    "clipped after averaging": m.clipped_after_averaging, "clipped by layer": m.clipped_by_layer,
    "weights": lambda: m.weighted_by_tokens(10.0), "clip twice too long": lambda: m.clipped_to(2.0),
    "noise a fifth too small": lambda: m.noise_times(0.8),
}  # fmt: skip


def client_audit(seed: int = 0):
    return audit_client(m.options(noise_multiplier=2.0), FedAvg(), m.plan(2.0), seed)


def test_a_right_build_passes():
    """The noise is fresh, so one audit in a hundred may fail: three of three do not."""
    found = [client_audit(seed) for seed in range(3)]
    assert any(verdict.holds for verdict in found)
    assert found[0].mu == 0.5 and found[0].epsilon < 2.3
    assert all(verdict.bounds.mu_bound < 0.8 for verdict in found)


def test_at_least_eight_of_nine_broken_builds_do_not_pass():
    caught = set()
    for name, broken in CLIENT.items():
        with broken():
            if not client_audit().holds:
                caught.add(name)
    assert len(caught) >= 8, set(CLIENT) - caught
    assert "noise a fifth too small" in CLIENT.keys() - caught or len(caught) == 9


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

    right = BookKeeping.add_clipped
    with m.patched(
        "fedgpt.local.bookkeeping.BookKeeping.add_clipped",
        lambda s, f, clip, t: right(s, f, 1e9, t),
    ):
        yield


@pytest.mark.parametrize("engine", ["bookkeeping", "opacus"])
def test_a_right_client_passes(engine):
    o, plan = tiny(engine=engine)
    found = [audit_example(o, VOCAB, plan, seed) for seed in range(2)]
    assert any(verdict.holds for verdict in found)
    assert found[0].mu == pytest.approx(8**0.5 / 2)


@pytest.mark.parametrize(
    "broken",
    [m.no_noise, lambda: m.noise_times(0.25), no_clip],
    ids=["no noise", "a quarter", "no clip"],
)
def test_a_broken_client_does_not(broken):
    """The noise is fresh: one audit of a quarter of it in fifteen sees too little, four of four do
    not.
    """
    o, plan = tiny()
    with broken():
        assert not all(audit_example(o, VOCAB, plan, seed).holds for seed in range(4))


def text(seed: int, words: int, length: int) -> np.ndarray:
    """A text that uses some tokens of the vocabulary often and others never."""
    rng = np.random.default_rng(seed)
    known = rng.choice(VOCAB, size=words, replace=False)
    return known[rng.zipf(1.5, size=length) % words]


def test_one_update_tells_the_tokens_and_a_private_one_does_not():
    o, plan = tiny(clip=1.0)
    tokens = text(0, 32, 200 * 17)
    assert token_leak(o, VOCAB, tokens, None, 8)["auc"] > 0.9
    found = [
        token_leak(o, VOCAB, tokens, replace(plan, planned=Event(1.0, 1.0, 8)), 8)["auc"]
        for _ in range(5)
    ]
    assert np.mean(found) < 0.62, "a random order, give or take"


def test_members_are_found_where_a_model_knows_its_text_by_heart():
    o, plan = tiny()
    o = replace(o, local=LocalOptions(steps=8, batch_size=16, lr=1e-2))
    tokens = np.random.default_rng(0).integers(VOCAB, size=40 * 17)  # nothing to learn but by heart
    assert membership(o, VOCAB, tokens, None, 300)["auc"] > 0.9
    noisy = replace(plan, planned=Event(30.0, 1.0, 300))
    hidden = [membership(o, VOCAB, tokens, noisy, 300) for _ in range(3)]
    assert np.mean([each["auc"] for each in hidden]) < 0.7 and hidden[0]["blocks"] == 20
