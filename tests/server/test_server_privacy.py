"""The server's side of privacy: sensitivity, noise, participation, broken implementations."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support import mechanism as m
from support.correlated import running_noise
from support.mechanism import CLIP, COHORT, QUIET, SIZE, Mechanism

from fedgpt.aggregate.fedadam import FedAdam
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.fedavgm import FedAvgM
from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import FedGPTError, StoppedEarly
from fedgpt.core.messages import ClientInfo, Pacing, Reply
from fedgpt.core.options import RunOptions
from fedgpt.core.score import Score
from fedgpt.privacy.accounting import Event, epsilon_of, gaussian_epsilon
from fedgpt.privacy.plan import make_plan
from fedgpt.privacy.randomness import SecureStream
from fedgpt.server.collector import Collectors
from fedgpt.server.privacy import PaidByClients, PaidByServer
from fedgpt.storage.best_weights import BestWeights
from fedgpt.storage.checkpoint import Checkpoints, Snapshot
from fedgpt.storage.tables import Clients, RunIdentity, VersionLine
from fedgpt.update.wire import encode


def deltas(count: int = 6, size: int = SIZE, scale: float = 1.0) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(7)
    return [((scale * rng.standard_normal(size)).astype(np.float32), 100) for _ in range(count)]


# ---- four checks of an implementation, each True if it is correct


def bounded_sensitivity(folder: Path) -> bool:
    """One more client moves the sum by the clip at most, whatever its update is.

    An update opposite to the others moves it by at least 0.99 of the clip.
    """
    others = deltas()
    total = np.sum([delta for delta, _ in others], axis=0)
    victims = [
        (-total * 100, 1),
        (total * 1e4, 100),
        (deltas(9)[-1][0], 1000),
        (np.zeros(SIZE, np.float32), 100),
        (np.float32(1e-3) * others[0][0], 100),
    ]
    distances = []
    for number, victim in enumerate(victims):
        released = [
            Mechanism(folder / f"{number}-{kind}", QUIET).release(updates)
            for kind, updates in (("without", others), ("with", [*others, victim]))
        ]
        distances.append(
            float(np.linalg.norm((released[1] - released[0]).astype(np.float64))) * COHORT
        )
    return bool(max(distances) <= CLIP * (1 + 1e-5) and distances[0] > 0.99 * CLIP)


def correct_noise(folder: Path) -> bool:
    """Divided by z * C, the noise in the sum is standard normal, for any number of clients."""
    found = []
    for count in (0, 3):
        empty = [(np.zeros(SIZE, np.float32), 1)] * count
        released = Mechanism(folder / f"{count}", 2.0).release(empty) * COHORT / (2.0 * CLIP)
        if not released.any():
            return False
        close = abs(released.std() - 1) < 4 / math.sqrt(2 * SIZE)
        found.append(close and stats.kstest(released, "norm").pvalue > 1e-4)
    return all(found)


def independent_noise(folder: Path) -> bool:
    """The noise is uncorrelated between versions and between runs of one seed."""
    empty_sum = [(np.zeros(SIZE, np.float32), 1)]
    first, other = Mechanism(folder / "a", 1.0), Mechanism(folder / "b", 1.0)
    released = [first.release(empty_sum), first.release(empty_sum), other.release(empty_sum)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    return all(
        abs(np.corrcoef(released[i], released[j])[0, 1]) < 4 / math.sqrt(SIZE) for i, j in pairs
    )


def clip_finds_the_median(folder: Path) -> bool:
    """From far above and far below, the adaptive clip ends near the median of the norms."""
    found = []
    for start in (0.05, 20.0):
        build = Mechanism(folder / f"{start}", 0.1, size=10, clip=start, adaptive=True)
        build.privacy.plan = m.plan(0.1)
        for _ in range(60):
            build.release(
                [
                    (np.full(10, length / math.sqrt(10), np.float32), 1)
                    for length in np.linspace(0.5, 1.5, 10)
                ]
            )
        found.append(0.6 < build.privacy.clip < 1.6)
    return all(found)


def clip_moves_by_noise(folder: Path) -> bool:
    """Without updates the adaptive clip moves by noise of the size that the ledger assumes."""
    build = Mechanism(folder, 0.1, size=1, adaptive=True)
    build.privacy.plan = m.plan(0.1)
    clips = [CLIP]
    for _ in range(150):
        build.release([])
        clips.append(float(build.state.memory["privacy/clip"]))
    # C <- C exp(-0.2 share), where the share is noise of 0.05
    found = np.diff(np.log(clips)) / -0.2 / 0.05
    close = abs(found.std() - 1) < 4 / math.sqrt(2 * len(found))
    return bool(found.any() and close and stats.kstest(found, "norm").pvalue > 1e-4)


def updates_pay_for_the_bits(folder: Path) -> bool:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) with sigma_b = 0.05 K = 0.5."""
    build = Mechanism(folder, 0.8, adaptive=True)
    build.privacy.plan = m.plan(0.8)
    expected = (0.8**-2 - 1) ** -0.5
    released = build.release([]) * COHORT / (expected * CLIP)
    return bool(abs(released.std() - 1) < 4 / math.sqrt(2 * SIZE))


CHECKS = (
    bounded_sensitivity,
    correct_noise,
    independent_noise,
    clip_finds_the_median,
    clip_moves_by_noise,
    updates_pay_for_the_bits,
)
BROKEN = {
    "no noise": (m.no_noise, {correct_noise, independent_noise}),
    "a tenth of the noise": (lambda: m.noise_times(0.1), {correct_noise}),
    "noise a tenth too small": (lambda: m.noise_times(0.9), {correct_noise}),
    "divided by the participants": (
        m.divided_by_participants,
        {bounded_sensitivity, correct_noise},
    ),
    "noise divided twice": (m.noise_divided_twice, {correct_noise}),
    "no clipping": (m.not_clipped, {bounded_sensitivity}),
    "clipped after averaging": (m.clipped_after_averaging, {bounded_sensitivity}),
    "clipped by layer": (m.clipped_by_layer, {bounded_sensitivity}),
    "weighted sums": (m.weighted_by_tokens, {bounded_sensitivity}),
    "reused noise": (m.reused_noise, {independent_noise}),
    "no noise on the bits of the adaptive clip": (m.noiseless_bits, {clip_moves_by_noise}),
    "bits that nobody pays for": (m.unpaid_bits, {updates_pay_for_the_bits}),
    "wrong sign of the adaptive clip": (m.wrong_sign, {clip_finds_the_median}),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_correct_implementation_passes_every_check(tmp_path, check):
    assert check(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_implementation_fails_its_checks(tmp_path, name):
    broken, expected = BROKEN[name]
    with broken():
        caught = set()
        for check in expected:
            try:
                correct = check(tmp_path / check.__name__)
            except (ZeroDivisionError, OverflowError, ValueError, FloatingPointError):
                correct = False
            if not correct:
                caught.add(check)
    assert caught == expected


# ---- what is released


def test_a_release_is_the_clipped_sum_over_a_constant(tmp_path):
    updates = deltas(4, scale=1e-3)  # shorter than the clip
    released = Mechanism(tmp_path, QUIET).release(updates)
    np.testing.assert_allclose(
        released, np.sum([d for d, _ in updates], axis=0) / COHORT, atol=1e-7
    )


def test_a_release_without_participants_has_noise(tmp_path):
    assert Mechanism(tmp_path, 1.0).release([]).any()


@pytest.mark.parametrize("rule", [FedAvgM(), FedAdam()], ids=lambda r: r.name)
def test_server_optimisers_see_the_noised_sum_only(tmp_path, rule):
    """Post-processing: the same released sum gives the same model, whatever the updates were."""
    build = Mechanism(tmp_path / "a", 1.0, strategy=rule)
    build.release(deltas())
    plain = Mechanism(tmp_path / "b", 1.0)
    plain.privacy.key = build.privacy.key
    d = plain.release(deltas())
    assert (
        build.state.params == rule.step(d, m.ServerState(np.zeros(SIZE, np.float32))).params
    ).all()


def test_the_same_sum_again_is_the_same_release_and_another_sum_is_not(tmp_path):
    first = Mechanism(tmp_path, 1.0)
    released = first.release(deltas())
    paid = first.privacy.ledger.account.epsilon
    again = Mechanism(tmp_path, 1.0)  # started again from version 0
    np.testing.assert_array_equal(again.release(deltas()), released)
    assert again.privacy.ledger.account.epsilon == paid
    other = Mechanism(tmp_path, 1.0)
    different = other.release(deltas(5))
    # the same coins again, so the participants are known: no amplification
    twice = [Event(1.0, 0.1, 1), Event(1.0, 1.0, 1)]
    assert other.privacy.ledger.account.epsilon == epsilon_of(twice, 1e-5) > paid
    without_noise = (
        np.sum([d * np.float32(min(1, CLIP / np.linalg.norm(d))) for d, _ in deltas(6)[5:]], axis=0)
        / COHORT
    )
    assert np.linalg.norm(released - different) > 5 * np.linalg.norm(without_noise), (
        "the noise does not cancel"
    )


def test_a_version_made_again_has_no_amplification_even_if_its_tag_is_forgotten(
    tmp_path, monkeypatch
):
    """After a kill, a run with few checkpoints goes back by more versions than are remembered."""
    monkeypatch.setattr("fedgpt.privacy.ledger.REMEMBERED", 2)
    build = Mechanism(tmp_path, 1.0)
    for _ in range(4):
        build.release(deltas())
    again = Mechanism(tmp_path, 1.0)  # from version 0, with another sum
    again.release(deltas(5))
    assert again.privacy.ledger.account.events == (Event(1.0, 0.1, 4), Event(1.0, 1.0, 1))


@pytest.mark.parametrize("what", ["sum", "bits", "clip"])
def test_a_release_that_differs_in_anything_has_other_noise(tmp_path, what):
    """Two releases with one noise would show the difference of what was released."""
    noises = []
    for value in (0.5, -0.5):
        privacy = Mechanism(tmp_path, 0.1, adaptive=True).privacy
        privacy.bits = value if what == "bits" else 0.0
        privacy.clip = CLIP * (2 if what == "clip" and value > 0 else 1)
        mean = np.full(SIZE, value if what == "sum" else 0.0, np.float32)
        state = m.ServerState(np.zeros(SIZE, np.float32))
        noises.append(privacy.release(mean.copy(), COHORT, state, Clients())[0] - mean)
    assert abs(np.corrcoef(*noises)[0, 1]) < 5 / math.sqrt(SIZE)
    assert sum(event.count for event in privacy.ledger.account.events) == 2


def test_the_noise_grows_with_the_adapted_clip(tmp_path):
    build = Mechanism(tmp_path, 0.8, adaptive=True)
    build.state = replace(build.state, memory={"privacy/clip": np.array(4 * CLIP)})
    z = (0.8**-2 - 1) ** -0.5  # see updates_pay_for_the_bits
    released = build.release([]) * COHORT / (z * 4 * CLIP)
    assert abs(released.std() - 1) < 4 / math.sqrt(2 * SIZE)


def test_no_noise_is_drawn_for_a_release_that_could_not_be_charged(tmp_path, monkeypatch):
    build, drawn = Mechanism(tmp_path, 1.0), []

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedgpt.privacy.ledger.write_text", disk_full)
    monkeypatch.setattr("fedgpt.server.privacy.SecureStream", lambda *words: drawn.append(words))
    with pytest.raises(OSError, match="No space left"):
        build.release(deltas())
    assert not drawn


def test_a_run_whose_ledger_could_not_be_created_can_start_again(tmp_path, monkeypatch):
    """A key without a ledger would look like a run whose ledger is gone."""

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedgpt.privacy.ledger.write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            Mechanism(tmp_path, 1.0)
    assert Mechanism(tmp_path, 1.0).release([]).any()


def test_no_weight_of_an_update_is_above_1(tmp_path):
    class Eager(FedBuff):
        def discount(self, staleness: int) -> float:
            return 2.0

    privacy = bounded(tmp_path)
    privacy.begin(m.ServerState(np.zeros(4, np.float32)))
    update = m.Update("a", 0, 0, np.ones(4, np.float32), 1, {"update_norm": 2.0})
    assert privacy.take(update, Eager(), 0)[1] == 1.0


def test_the_epsilon_of_a_run_is_that_of_its_releases(tmp_path):
    build = Mechanism(tmp_path, 1.0)
    for _ in range(5):
        build.release(deltas())
    assert build.privacy.metrics(build.clients)["epsilon"] == epsilon_of([Event(1.0, 0.1, 5)], 1e-5)
    (event,) = json.loads((tmp_path / "ledger.json").read_text())["events"]
    assert event == {"noise_multiplier": 1.0, "sampling_probability": 0.1, "count": 5}


def test_the_budget_stops_a_run_before_the_release(tmp_path):
    build = Mechanism(tmp_path, 1.0)
    build.privacy.plan = replace(
        build.privacy.plan, budget=epsilon_of([Event(1.0, 0.1, 3)], 1e-5) * 1.0001
    )
    for _ in range(3):
        build.release(deltas())
    last = build.state
    with pytest.raises(
        StoppedEarly, match="the model of version 3 is the last with a charged release"
    ):
        build.release(deltas())
    assert build.state is last


def test_a_release_beyond_the_plan_is_compared_with_the_budget(tmp_path):
    """Those of the plan are not, as the cost of the complete plan has been."""
    build = Mechanism(tmp_path, 1.0)
    planned = Event(1.0, 0.1, 3)
    cost = epsilon_of([planned], 1e-5)
    build.privacy.plan = replace(build.privacy.plan, planned=planned, budget=cost * 1.0001)
    for _ in range(3):
        build.release(deltas())
    with pytest.raises(StoppedEarly, match="the model of version 3 is the last"):
        build.release(deltas())


def test_a_version_made_again_is_compared_with_the_budget(tmp_path):
    """The plan covers amplified releases, and this one is not."""
    planned = Event(1.0, 0.1, 3)
    plan = replace(m.plan(1.0), planned=planned, budget=epsilon_of([planned], 1e-5) * 1.0001)
    first = Mechanism(tmp_path, 1.0)
    first.privacy.plan = plan
    first.release(deltas())
    again = Mechanism(tmp_path, 1.0)  # from version 0, with another sum
    again.privacy.plan = plan
    with pytest.raises(StoppedEarly, match="the model of version 0 is the last"):
        again.release(deltas(5))


def test_the_ledger_identifies_the_noise_without_revealing_it(tmp_path):
    build = Mechanism(tmp_path, 1.0)
    released = build.release([])
    (entry,) = json.loads((tmp_path / "ledger.json").read_text())["releases"]
    for words in ((), ("noise",), ("noise", entry["tag"])):
        guess = SecureStream(bytes.fromhex(entry["tag"]), *words).normal(SIZE)
        assert abs(np.corrcoef(released, guess)[0, 1]) < 5 / math.sqrt(SIZE)
    Mechanism(tmp_path / "other", 1.0).release([])
    (other,) = json.loads((tmp_path / "other" / "ledger.json").read_text())["releases"]
    assert other["tag"] != entry["tag"], "without the key no guess of the sum is confirmed"


def test_a_missing_ledger_is_an_error_after_the_first_release(tmp_path):
    Mechanism(tmp_path, 1.0).release([])
    (tmp_path / "ledger.json").unlink()
    with pytest.raises(FedGPTError, match="the privacy loss so far is unknown"):
        # killed before its first checkpoint, a run begins with version 0 again
        Mechanism(tmp_path, 1.0)


def test_an_update_that_is_not_finite_counts_as_zeros(tmp_path):
    """Rejecting it would be visible: other clients would take its places in releases."""
    build = Mechanism(tmp_path, QUIET)
    build.open(3)
    job = m.Job("a", 0, 0, build.state.params, m.Plan("run", 1, 0, 1, 1))
    for scale in (np.nan, np.inf, 1e30):  # the last is longer than any limit on norms
        delta = np.full(SIZE, scale, np.float32)
        header, payload = encode("run", m.Update("a", 0, 0, delta, 10, {}))
        update = build.collector.read(Reply("a", 0, header, payload), job, 10)
        counted = build.collector.add(update, job, 0)
        assert np.linalg.norm(counted.delta) == pytest.approx(
            CLIP if scale == 1e30 else 0, rel=1e-5
        )
    assert len(build.collector) == 3


def test_the_norm_of_noise_of_privacy_local_is_accepted(tmp_path):
    """The norm limit follows the updates, and noise alone may be far longer than these."""
    o = m.options(unit="local", noise_multiplier=3.0)
    privacy = PaidByClients(o, make_plan(o, [1000] * 10), tmp_path)
    collectors = Collectors(o, FedAvg(), privacy, SIZE, "run")
    state = m.ServerState(np.zeros(SIZE, np.float32))
    collector = collectors.open(state, (0.01,), 5, Clients())
    noise = SecureStream(bytes(32), "test").normal(SIZE) * np.float32(2 * CLIP * 3.0)
    header, payload = encode("run", m.Update("a", 0, 0, noise, 10, {}))
    job = m.Job("a", 0, 0, state.params, m.Plan("run", 1, 0, 1, 1))
    update = collector.read(Reply("a", 0, header, payload), job, 10)
    assert update.metrics["update_norm"] == pytest.approx(np.linalg.norm(noise), rel=1e-5)


def test_seeded_noise_is_the_same_in_every_run(tmp_path):
    one, two = (Mechanism(tmp_path / name, 1.0, rng="seeded").release(deltas()) for name in "ab")
    np.testing.assert_array_equal(one, two)


# ---- correlated noise


def test_correlated_noise_cancels_in_later_releases(tmp_path):
    bands, versions = 4, 30
    build = Mechanism(tmp_path, 1.0, bands=bands, separation=bands)
    build.privacy.plan = m.plan(1.0, "correlated", scale=2.0)
    sums = []
    for _ in range(versions):
        build.release([])
        sums.append(build.state.params * COHORT / (2.0 * CLIP))
    found = math.sqrt(np.mean(np.square(sums)))
    assert found == pytest.approx(running_noise(bands, versions), rel=0.05)
    assert found < 0.8 * running_noise(1, versions)
    assert set(build.state.memory) == {"privacy/noise/1", "privacy/noise/2", "privacy/noise/3"}


def test_a_series_is_paid_for_once(tmp_path):
    build = Mechanism(tmp_path, 1.0, bands=2, separation=2)
    build.privacy.plan = replace(m.plan(1.0, "correlated"), planned=Event(1.0, 1.0, 1))
    for _ in range(4):
        build.release([])
        assert build.privacy.metrics(build.clients)["epsilon"] == gaussian_epsilon(1.0, 1e-5)
    other = Mechanism(tmp_path, 1.0, bands=2, separation=2)
    other.privacy.plan = build.privacy.plan
    with pytest.raises(StoppedEarly, match="correlated noise cannot go back"):
        other.release(deltas())


# ---- who may take part


def bounded(folder: Path, participations: int = 3, **privacy) -> PaidByServer:
    o = m.options(**privacy)
    return PaidByServer(o, m.plan(1.0, "bounded", participations), folder, "data", fresh=True)


def test_a_client_participates_as_often_as_allowed_and_once_in_a_sum(tmp_path):
    privacy, clients = bounded(tmp_path), Clients()
    state = m.ServerState(np.zeros(4, np.float32))
    update = m.Update("a", 0, 0, np.ones(4, np.float32), 1, {"update_norm": 2.0})
    for version in range(3):
        assert privacy.may_ask("a", version, clients)
        privacy.begin(state)
        _, weight = privacy.take(update, FedAvg(), 0)
        assert (
            weight == 1
            and not privacy.may_ask("a", version, clients)
            and privacy.may_ask("b", version, clients)
        )
        state = replace(state, version=version)
        privacy.release(np.zeros(4, np.float32), 10.0, state, clients)
        privacy.shares = {}
    assert not privacy.may_ask("a", 3, clients) and privacy.may_ask("b", 3, clients)
    assert privacy.metrics(clients)["epsilon"] == pytest.approx(
        gaussian_epsilon(math.sqrt(3), 1e-5)
    )


def test_a_stale_update_counts_and_costs_less(tmp_path):
    privacy, clients = bounded(tmp_path), Clients()
    state = m.ServerState(np.zeros(4, np.float32))
    privacy.begin(state)
    update = m.Update("a", 0, 0, np.ones(4, np.float32), 1000, {"update_norm": 2.0})
    _, weight = privacy.take(update, FedBuff(), 3)
    assert weight == 0.5
    assert privacy.bits == -0.25, "its bit counts as much as its update, for which it is charged"
    privacy.release(np.zeros(4, np.float32), 10.0, state, clients)
    assert privacy.ledger.account.spent == {"a": 0.25}
    assert privacy.metrics(clients)["epsilon"] == pytest.approx(
        gaussian_epsilon(0.5, 1e-5), abs=1e-6
    )


def test_the_budget_holds_where_each_client_pays_for_itself(tmp_path):
    privacy, clients = bounded(tmp_path, participations=9), Clients()
    privacy.plan = replace(privacy.plan, budget=gaussian_epsilon(math.sqrt(2), 1e-5) * 1.001)
    state = m.ServerState(np.zeros(4, np.float32))
    update = m.Update("a", 0, 0, np.ones(4, np.float32), 1, {"update_norm": 2.0})
    for version in range(3):
        privacy.begin(state)
        privacy.take(update, FedAvg(), 0)
        if version == 2:
            with pytest.raises(
                StoppedEarly, match="the model of version 2 is the last with a charged release"
            ):
                privacy.release(
                    np.zeros(4, np.float32), 10.0, replace(state, version=version), clients
                )
        else:
            privacy.release(np.zeros(4, np.float32), 10.0, replace(state, version=version), clients)
    assert privacy.metrics(clients)["epsilon"] == pytest.approx(
        gaussian_epsilon(math.sqrt(2), 1e-5)
    )


def test_a_rollback_to_the_best_weights_keeps_the_noise(tmp_path):
    build = Mechanism(tmp_path, 1.0, bands=3, separation=3)
    build.privacy.plan = m.plan(1.0, "correlated", scale=2.0)
    build.release([])
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    snapshot = Snapshot(build.state, RunIdentity("test"), VersionLine({}))
    best = BestWeights(RunOptions(), checkpoints, snapshot, Score("loss"))
    best.decide(build.state, 1.0)
    first = build.state
    build.release([])
    state, fields = best.decide(build.state, 2.0)
    checkpoints.close()
    assert fields and (state.params == first.params).all()
    np.testing.assert_array_equal(
        state.memory["privacy/noise/1"], build.state.memory["privacy/noise/1"]
    )


def test_a_client_waits_for_separation_versions(tmp_path):
    privacy, clients = bounded(tmp_path, separation=3), Clients()
    clients.note_release("a", 4)
    assert [privacy.may_ask("a", version, clients) for version in (5, 6, 7)] == [False, False, True]


def test_with_coins_nothing_but_the_coin_decides_who_takes_part(tmp_path):
    build = Mechanism(tmp_path, 1.0)
    build.release(deltas())
    assert build.privacy.may_ask("client 0", build.state.version - 1, build.clients)


def test_the_divisor_is_a_constant(tmp_path):
    privacy = bounded(tmp_path)
    assert privacy.divisor(FedAvg(), Pacing("cohort", 5, 5)) == COHORT
    for rule in (FedBuff(), FedAvg()):  # by the sum of the weights, as a rule of a user may do
        assert privacy.divisor(rule, Pacing("buffer", 8, 4)) == 4


def test_the_coins_are_secret_and_the_same_for_a_repeated_version(tmp_path):
    one, two = bounded(tmp_path / "a"), bounded(tmp_path / "b")
    np.testing.assert_array_equal(one.coins(3, 50), bounded(tmp_path / "a").coins(3, 50))
    assert (one.coins(3, 50) != two.coins(3, 50)).all() and (
        one.coins(4, 50) != one.coins(3, 50)
    ).all()


def test_the_epsilon_of_privacy_example_is_that_of_the_client_that_paid_most(tmp_path):
    from fedgpt.core.options import (
        LocalOptions,
        ModelOptions,
        PaceOptions,
        PrivacyOptions,
        RunOptions,
    )

    o = RunOptions(
        rounds=10,
        model=ModelOptions(block_size=9),
        local=LocalOptions(steps=5, batch_size=4),
        privacy=PrivacyOptions(unit="example", target_epsilon=4.0),
        pace=PaceOptions(clients=0),
    )
    plan = make_plan(o, [1000, 4000])
    assert plan.planned.sampling_probability == 0.04 and plan.planned.count == 50
    privacy, clients = PaidByClients(o, plan, tmp_path), Clients()
    privacy.meet([ClientInfo("small", 1000), ClientInfo("large", 4000)])
    for _ in range(10):
        for client in ("small", "large"):
            assert privacy.may_ask(client, 0, clients)
            privacy.asked(client, 5, clients)
    assert not privacy.may_ask("small", 0, clients)
    refused = m.Job("small", 10, 9, np.zeros(1, np.float32), m.Plan("run", 5, 0, 1, 1))
    privacy.refused(refused, clients)  # by the site's policy: it may be asked for another
    assert privacy.may_ask("small", 0, clients) and not privacy.may_ask("large", 0, clients)
    privacy.asked("small", 5, clients)
    assert 3.9 < privacy.metrics(clients)["epsilon"] <= 4.0
    ledger = tmp_path / "ledger.json"
    assert json.loads(ledger.read_text())["events"][0]["count"] == 50
    assert ledger.stat().st_mode & 0o777 == 0o600, "it has the number of jobs of each client"
    clients = Clients({"charged": {"small": 1.0, "large": 50.0}})
    costs = [
        epsilon_of([Event(plan.noise_multiplier, q, n)], plan.delta)
        for q, n in ((0.04, 1), (0.01, 50))
    ]
    assert privacy.metrics(clients)["epsilon"] == max(costs)
    privacy.answered(
        m.Update("small", 0, 0, np.zeros(1, np.float32), 1, {"charged": 60.0}), clients
    )
    assert clients.charges["small"] == 60, (
        "the job was repeated after a crash, and was paid for again"
    )
