"""Ten clients, two of them attackers: robust rules stay near the honest mean, where the mean does not."""

from __future__ import annotations

import numpy as np
import pytest
from cohorts import ready, start, update_of

from fedgpt.aggregate.centred_clip import CentredClip
from fedgpt.aggregate.fltrust import FLTrust
from fedgpt.aggregate.geometric_median import GeometricMedian
from fedgpt.aggregate.krum import Krum
from fedgpt.aggregate.median import Median
from fedgpt.aggregate.norm_clip import NormClip
from fedgpt.aggregate.trimmed_mean import TrimmedMean
from fedgpt.core.messages import Update


def attacked(attack, n=10, bad=2, size=2000):
    """(updates, the honest mean, the server's own update)."""
    rng = np.random.default_rng(7)
    truth = rng.standard_normal(size) * 0.01
    deltas = truth + rng.standard_normal((n, size)) * 0.01
    honest = deltas[bad:].mean(axis=0)
    if attack == "sign flip x3":
        deltas[:bad] *= -3
    elif attack == "x100":
        deltas[:bad] *= 100
    else:
        deltas[:bad] = rng.standard_normal((bad, size))  # 100 times the size of the others
    root = Update("server", 0, 0, (truth + rng.standard_normal(size) * 0.01).astype(np.float32), 1)
    return update_of(*deltas, dtype=np.float32), honest, root


def cosine(a, b):
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


@pytest.mark.parametrize("attack", ["sign flip x3", "gaussian x100", "x100"])
@pytest.mark.parametrize(
    "rule",
    [Median(), TrimmedMean(trim=2), Krum(attackers=2), GeometricMedian(), NormClip(), CentredClip(), FLTrust()],
    ids=lambda rule: rule.name,
)
def test_robust_rules_withstand_attackers(rule, attack):
    cohort, honest, root = attacked(attack)
    state = start(2000)
    d = rule.combine(ready(rule, cohort, state), state, root if rule.needs_root else None)
    assert cosine(d, honest) >= 0.8
    assert np.linalg.norm(d) < 2 * np.linalg.norm(honest)


def test_the_mean_does_not():
    cohort, honest, _ = attacked("gaussian x100")
    mean = np.mean([update.delta for update in cohort], axis=0)
    assert cosine(mean, honest) < 0.3 and np.linalg.norm(mean) > 5 * np.linalg.norm(honest)
