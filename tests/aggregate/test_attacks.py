"""Ten clients, some of them attackers who know what the honest ones send and agree on what they
send themselves.

Robust rules stay near the honest mean where the mean does not; with too many attackers each breaks
in its own way.
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
# (honest updates, own generator) -> what an attacker sends; mean and spread are the honest ones'
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
    """Every robust rule, told of `bad` attackers where it asks, or of as many as ten clients allow
    (Krum: 3).
    """
    told = [TrimmedMean(trim=bad), Krum(attackers=min(bad, 3))]
    return [Median(), *told, GeometricMedian(), NormClip(), CentredClip(), FLTrust()]


def cohort(bad, attack, offset=0.0):
    """(all updates as rows, attackers first; the honest ones; the server's own update).

    `offset`: how far the means of honest clients are apart, as with texts of different authors.
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
    """From the honest mean, in lengths of it."""
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
def test_they_do_move_the_mean(attack, least):
    """Otherwise the test above would say nothing. ALIE hides within the spread: in one step it
    moves nobody far.
    """
    rows, honest, _ = cohort(2, attack)
    assert distance(rows.mean(axis=0), honest) >= least


@every_attack
@pytest.mark.parametrize(
    "rule", [r for r in rules(4) if r.name != "krum"], ids=lambda rule: rule.name
)
def test_four_of_ten_shorten_a_step_and_turn_it_but_never_against_the_honest_mean(rule, attack):
    """Short of half of the clients: the step keeps its direction, more or less, and is off by one
    length at most.
    """
    rows, honest, root = cohort(4, attack)
    d = d_of(rule, rows, root)
    assert direction(d, honest) >= 0.45 and distance(d, honest) <= 1.0


@every_attack
def test_fltrust_does_not_mind_how_many_they_are(attack):
    rows, honest, root = cohort(7, attack)
    d = d_of(FLTrust(), rows, root)
    assert direction(d, honest) >= 0.75 and np.linalg.norm(d) <= np.linalg.norm(root.delta) * (
        1 + 1e-6
    )


def test_krum_breaks_with_one_attacker_more_than_it_is_told_of():
    """Four who send the same are each other's nearest: Krum, which ten clients allow to expect
    three, keeps them.
    """
    rows, honest, root = cohort(4, "IPM 10")
    assert direction(d_of(Krum(attackers=3), rows, root), honest) < -0.9
    rows, honest, root = cohort(3, "IPM 10")
    assert distance(d_of(Krum(attackers=3), rows, root), honest) < 0.01


@pytest.mark.parametrize(
    "rule", [Median(), TrimmedMean(trim=4), GeometricMedian()], ids=lambda rule: rule.name
)
def test_half_of_the_clients_are_the_end_of_rules_that_compare(rule):
    rows, honest, root = cohort(6, "IPM 10")
    assert direction(d_of(rule, rows, root), honest) < 0


@pytest.mark.parametrize("rule", rules(2), ids=lambda rule: rule.name)
@pytest.mark.parametrize("offset", [0.0, 0.01, 0.03, 0.1])
def test_without_attackers_clients_that_differ_cost_a_bounded_distance(rule, offset):
    """Honest means spread up to ten times as wide as their common part: D stays among the clients,
    near their mean.
    """
    rows, honest, root = cohort(0, "x100", offset)
    d = d_of(rule, rows, root)
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).mean()
    # as long as the server's own update at most, whatever the clients' lengths
    if rule.name == "fltrust":
        assert (
            np.linalg.norm(d) <= np.linalg.norm(root.delta) * (1 + 1e-6)
            and direction(d, honest) > 0.8
        )
    else:
        assert np.linalg.norm(d - honest.mean(axis=0)) <= 0.25 * spread
        assert (d >= rows.min(axis=0) - 1e-6).all() and (d <= rows.max(axis=0) + 1e-6).all()
