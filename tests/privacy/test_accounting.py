"""Epsilon, compared with published figures, other libraries and closed forms."""

from __future__ import annotations

import math

import pytest

from fedgpt.privacy.accounting import (
    Event,
    accountant_of,
    calibrate,
    epsilon_of,
    gaussian_epsilon,
    gaussian_mu,
    renyi_epsilon,
)

# releases, delta -> epsilon by dp-accounting's PLD and RDP and Opacus' PRV accountant, computed
# with those libraries directly
ROWS = [
    (Event(1.0, 0.01, 1000), 1e-5, 1.828, 2.101, 1.838),
    (Event(0.8, 0.016, 500), 1e-5, 3.749, 4.386, 3.759),
    (Event(0.6, 0.05, 200), 1e-4, 13.119, 15.227, 13.130),
    (Event(2.0, 0.1, 300), 1e-4, 3.597, 3.992, 3.607),
    (Event(0.5, 0.02, 20), 1e-3, 3.389, 4.863, 3.400),
]


@pytest.mark.parametrize(("event", "delta", "pld", "rdp", "prv"), ROWS)
def test_sampled_releases_cost_the_same_as_in_other_accountants(event, delta, pld, rdp, prv):
    assert epsilon_of([event], delta) == pytest.approx(pld, abs=1e-3)
    assert renyi_epsilon((event,), delta) == pytest.approx(rdp, abs=2e-3)
    assert 0 <= prv - epsilon_of([event], delta) < 0.012, (
        "Opacus adds its error bound to its estimate"
    )


def test_the_installed_opacus_agrees():
    from opacus.accountants import PRVAccountant, RDPAccountant

    z, q, steps, delta = 1.0, 0.02, 200, 1e-5
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(z, q, steps)]
    ours = epsilon_of([Event(z, q, steps)], delta)
    assert 0 <= prv.get_epsilon(delta=delta) - ours < 0.012
    assert (
        ours
        < rdp.get_epsilon(delta=delta)
        == pytest.approx(renyi_epsilon((Event(z, q, steps),), delta), rel=2e-3)
    )


def test_the_installed_dp_accounting_agrees_on_mixed_events():
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    events = [Event(1.0, 0.05, 40), Event(2.0, 0.1, 30), Event(4.0, 1.0, 2)]
    accountant = PLDAccountant()
    for e in events:
        gaussian = dp_accounting.GaussianDpEvent(e.noise_multiplier)
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(e.sampling_probability, gaussian), e.count
        )
    assert epsilon_of(events, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)


@pytest.mark.parametrize(
    ("z", "participations", "epsilon"),
    [
        (1, 1, 4.38),
        (1, 10, 17.86),
        (1, 50, 54.4),
        (2, 10, 7.51),
        (4, 10, 3.34),
        (4, 50, 8.60),
        (8, 50, 3.80),
    ],
)
def test_bounded_participation_has_a_closed_form(z, participations, epsilon):
    found = epsilon_of([Event(z, 1.0, participations)], 1e-5)
    assert found == pytest.approx(epsilon, rel=2e-3)
    assert found == gaussian_epsilon(math.sqrt(participations) / z, 1e-5)


def test_the_closed_form_equals_the_composition_of_dp_accounting():
    from dp_accounting.pld import privacy_loss_distribution

    loss = privacy_loss_distribution.from_gaussian_mechanism(
        3.0, value_discretization_interval=1e-4
    )
    assert gaussian_epsilon(math.sqrt(7) / 3, 1e-5) == pytest.approx(
        loss.self_compose(7).get_epsilon_for_delta(1e-5), abs=1e-3
    )


def test_no_release_costs_0_and_a_release_without_noise_costs_infinity():
    assert epsilon_of([], 1e-5) == 0
    assert epsilon_of([Event(1.0, 0.1, 0)], 1e-5) == 0
    assert epsilon_of([Event(0.0, 0.1, 1)], 1e-5) == math.inf
    assert gaussian_epsilon(1e-9, 1e-5) == 0, "such a small mu costs less than delta"
    assert gaussian_epsilon(60.0, 1e-6) > 1000, "e^eps alone would overflow"


@pytest.mark.parametrize(("q", "count"), [(0.05, 100), (1.0, 10)])
@pytest.mark.parametrize("target", [0.5, 2.0, 8.0])
def test_calibrated_noise_is_the_least_that_suffices(target, q, count):
    z = calibrate(target, q, count, 1e-5)
    assert target * 0.995 < epsilon_of([Event(z, q, count)], 1e-5) <= target
    assert epsilon_of([Event(z * 0.995, q, count)], 1e-5) > target


def test_mu_and_epsilon_are_inverse():
    assert gaussian_epsilon(gaussian_mu(3.0, 1e-5), 1e-5) == pytest.approx(3.0, abs=1e-6)


def test_noise_is_calibrated_even_for_a_large_delta():
    assert epsilon_of([Event(calibrate(0.5, 0.5, 1, 0.3), 0.5, 1)], 0.3) <= 0.5


def test_epsilon_decreases_with_the_noise_down_to_almost_none():
    """No accountant that is looser takes over while the noise becomes smaller."""
    noises = (1e-6, 0.005, 0.01, 0.1, 0.199, 0.2, 0.5)
    found = [epsilon_of([Event(z, 0.1, 10)], 1e-3) for z in noises]
    assert found == sorted(found, reverse=True) and math.isfinite(found[0])
    # 1/2z^2 is the loss of a unit that is in one release; with q = 0.1 it is in about one of ten
    assert found[noises.index(0.1)] < 10 * (1 / (2 * 0.1**2) + 8 / 0.1)


def test_a_sampled_release_never_costs_more_than_one_without_sampling():
    """The discretisation of these losses alone would add 1 to epsilon."""
    found = epsilon_of([Event(0.5, 0.999999, 3000)], 1e-5)
    assert found <= epsilon_of([Event(0.5, 1.0, 3000)], 1e-5)


@pytest.mark.parametrize(
    ("event", "precise"),
    [(Event(0.15, 0.1, 10), 146.17728), (Event(0.3, 0.1, 1000), 506.19093)],
    ids=["little noise", "many releases"],
)
def test_a_coarser_discretisation_changes_large_epsilons_very_little(event, precise):
    """The values were computed with losses that are ten times as fine."""
    assert precise * (1 - 1e-6) < epsilon_of([event], 1e-5) < precise * (1 + 1e-3)


# a target or delta at an end of its range, a sampling probability, a number of releases, a delta
ENDS = [
    (1000.0, 0.03, 100, 1e-3),  # once calibrated by one accountant and checked by another
    (730.0, 0.03, 100, 1e-3),  # e^730 is beyond float64
    (1e6, 0.3, 100, 1e-5),
    (1e-6, 0.1, 100, 1e-5),
    (0.01, 0.1, 100, 1e-5),
    (8.0, 0.1, 1000, 1e-14),
    (8.0, 0.1, 1000, 1e-18),
    (8.0, 0.1, 1000, 1e-300),
    (0.01, 0.1, 100, 1e-18),  # the Renyi bound of any noise is above such targets
    (0.5, 0.1, 100, 1e-300),
    (8.0, 0.9, 1, 0.99),
    (8.0, 0.1, 10**7, 1e-5),
    (8.0, 0.1, 10**12, 1e-5),
]


@pytest.mark.parametrize(("target", "q", "count", "delta"), ENDS)
@pytest.mark.parametrize("sampled", [True, False])
def test_noise_is_found_for_every_target_and_delta(target, q, count, delta, sampled):
    probability = q if sampled else 1.0
    z = calibrate(target, probability, count, delta)
    assert 0 < z < math.inf
    assert epsilon_of([Event(z, probability, count)], delta) <= target * (1 + 1e-9)


def test_epsilons_near_the_largest_power_of_e_are_bounds():
    """Between e^709.8 and e^745.2 the loss distributions compute infinity."""
    found = [epsilon_of([Event(z, 0.03, 100)], 1e-3) for z in (0.0815, 0.0802, 0.0795, 0.0775)]
    assert found == sorted(found) and found[0] < 709 and found[-1] > 745.3
    assert 745 < found[2] < 746


def test_the_accountant_is_named():
    assert accountant_of([Event(1.0, 0.1, 5)], 1e-5).endswith("privacy loss distributions")
    for event, delta in (
        (Event(1e-3, 0.1, 5), 1e-5),
        (Event(1.0, 0.1, 5), 1e-13),
        (Event(1.0, 0.1, 10**7), 1e-5),
    ):
        assert "Renyi divergences (an upper bound)" in accountant_of([event], delta)
        closed = gaussian_epsilon(math.sqrt(event.count) / event.noise_multiplier, delta)
        assert epsilon_of([event], delta) == min(renyi_epsilon((event,), delta), closed)
