"""Robust rules under attack: ten clients, some of which know all honest updates and collude.

Robust rules stay near the honest mean where the plain mean does not. With too many attackers each
rule fails in a different way.
"""

from __future__ import annotations

import numpy as np
import pytest
from support.cohorts import ready, start, update_of

from fedgpt.aggregate.centred_clip import CentredClip
from fedgpt.aggregate.fltrust import FLTrust
from fedgpt.aggregate.geometric_median import GeometricMedian
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.norm_clip import NormClip
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.core.messages import Update

SIZE, CLIENTS = 2000, 10
# name -> (honest updates, random generator) -> what an attacker sends
ATTACKS = {
    "sign flip x3": lambda honest, rng: -3 * honest[0],
    "x100": lambda honest, rng: 100 * honest[0],
    "gaussian x100": lambda honest, rng: rng.standard_normal(SIZE),
    "ALIE": lambda honest, rng: honest.mean(axis=0) - honest.std(axis=0),
    "IPM 0.5": lambda honest, rng: -0.5 * honest.mean(axis=0),
    "IPM 10": lambda honest, rng: -10 * honest.mean(axis=0),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS)


def rules(bad: int) -> list:
    """Every robust rule, configured for `bad` attackers if it has such an option.

    Krum expects at most 3, because ten clients allow no more.
    """
    configured = [TrimmedMean(trim=bad), Krum(attackers=min(bad, 3))]
    return [Median(), *configured, GeometricMedian(), NormClip(), CentredClip(), FLTrust()]


def cohort(bad, attack, offset=0.0):
    """(all updates as rows, attackers first; the honest updates; the server's own update).

    `offset` is how much the honest clients differ, as with texts of different authors.
    """
    rng = np.random.default_rng(7)
    truth = rng.standard_normal(SIZE) * 0.01
    own = truth + offset * rng.standard_normal((CLIENTS - bad, SIZE))
    honest = own + rng.standard_normal((CLIENTS - bad, SIZE)) * 0.01
    sent = [ATTACKS[attack](np.roll(honest, -i, axis=0), rng) for i in range(bad)]
    root = Update("server", 0, 0, (truth + rng.standard_normal(SIZE) * 0.01).astype(np.float32), 1)
    return np.vstack([*sent, honest]).astype(np.float32), honest, root


def d_of(rule, rows, root):
    state = start(SIZE)
    updates = ready(rule, update_of(*rows, dtype=np.float32), state)
    return rule.combine(updates, state, root if rule.needs_root else None)


def direction(d, honest):
    """Cosine with the honest mean."""
    mean = honest.mean(axis=0)
    return float(d @ mean / (np.linalg.norm(d) * np.linalg.norm(mean)))


def distance(d, honest):
    """Distance from the honest mean, over its norm."""
    mean = honest.mean(axis=0)
    return float(np.linalg.norm(d - mean) / np.linalg.norm(mean))


@every_attack
@pytest.mark.parametrize("rule", rules(2), ids=lambda rule: rule.name)
def test_two_attackers_of_ten_hardly_move_a_robust_rule(rule, attack):
    rows, honest, root = cohort(2, attack)
    d = d_of(rule, rows, root)
    assert direction(d, honest) >= 0.9 and distance(d, honest) <= 0.5


@pytest.mark.parametrize(
    "attack, least",
    [("sign flip x3", 0.8), ("x100", 20), ("gaussian x100", 10), ("IPM 0.5", 0.29), ("IPM 10", 2)],
)
def test_two_attackers_of_ten_move_the_mean(attack, least):
    """A control for the test above: plain averaging fails it.

    ALIE is left out: it stays within the spread of the honest updates and moves the mean little.
    """
    rows, honest, _ = cohort(2, attack)
    assert distance(rows.mean(axis=0), honest) >= least


@every_attack
@pytest.mark.parametrize(
    "rule", [r for r in rules(4) if r.name != "krum"], ids=lambda rule: rule.name
)
def test_four_attackers_of_ten_disturb_a_robust_rule_but_do_not_reverse_it(rule, attack):
    """With fewer attackers than half of the clients, the step keeps roughly its direction."""
    rows, honest, root = cohort(4, attack)
    d = d_of(rule, rows, root)
    assert direction(d, honest) >= 0.45 and distance(d, honest) <= 1.0


@every_attack
def test_fltrust_withstands_a_majority_of_attackers(attack):
    rows, honest, root = cohort(7, attack)
    d = d_of(FLTrust(), rows, root)
    assert direction(d, honest) >= 0.75
    assert np.linalg.norm(d) <= np.linalg.norm(root.delta) * (1 + 1e-6)


def test_krum_fails_with_one_attacker_more_than_configured():
    """Four equal updates are each other's nearest neighbours, so Krum keeps them."""
    rows, honest, root = cohort(4, "IPM 10")
    assert direction(d_of(Krum(attackers=3), rows, root), honest) < -0.9
    rows, honest, root = cohort(3, "IPM 10")
    assert distance(d_of(Krum(attackers=3), rows, root), honest) < 0.01


@pytest.mark.parametrize(
    "rule", [Median(), TrimmedMean(trim=4), GeometricMedian()], ids=lambda rule: rule.name
)
def test_rules_that_compare_updates_fail_with_a_majority_of_attackers(rule):
    rows, honest, root = cohort(6, "IPM 10")
    assert direction(d_of(rule, rows, root), honest) < 0


@pytest.mark.parametrize("rule", rules(2), ids=lambda rule: rule.name)
@pytest.mark.parametrize("offset", [0.0, 0.01, 0.03, 0.1])
def test_without_attackers_d_is_close_to_the_mean_of_clients_that_differ(rule, offset):
    """The clients differ by up to ten times the length of their common part."""
    rows, honest, root = cohort(0, "x100", offset)
    d = d_of(rule, rows, root)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).mean()
    if rule.name == "fltrust":  # no longer than the server's own update
        assert np.linalg.norm(d) <= np.linalg.norm(root.delta) * (1 + 1e-6)
        assert direction(d, honest) > 0.8
    else:
        assert np.linalg.norm(d - honest.mean(axis=0)) <= 0.25 * spread
        assert (d >= rows.min(axis=0) - 1e-6).all() and (d <= rows.max(axis=0) + 1e-6).all()
