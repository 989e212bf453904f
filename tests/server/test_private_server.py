"""The loop with privacy=client and scripted clients: sampling, payments and restarts."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import harness as scripted
from support.fake_transport import honest

from fedgpt.aggregate.fedbuff import FedBuff
from fedgpt.core.errors import FedGPTError, StoppedEarly
from fedgpt.core.faults import Injected, injected
from fedgpt.core.messages import Reply
from fedgpt.core.options import PrivacyOptions, RunOptions
from fedgpt.privacy.accounting import Event, epsilon_of, gaussian_epsilon
from fedgpt.privacy.plan import PrivacyPlan, make_plan

CLIENTS = {name: partial(honest, seconds=1.0 + index / 8) for index, name in enumerate("abcdefgh")}


def private(
    folder: Path, rounds: int = 6, pace: dict | None = None, **privacy
) -> tuple[RunOptions, PrivacyPlan]:
    o = scripted.options(folder, rounds, **(pace or {"rate": 0.5, "clients": 0}))
    o.privacy = PrivacyOptions(
        **{"unit": "client", "noise_multiplier": 1.0, "clip": 0.1, "rng": "seeded", **privacy}
    )
    return o, make_plan(o, [10_000] * len(CLIENTS))


def start(folder: Path, strategy=None, **about):
    o, plan = private(folder, **about)
    return scripted.run(o, CLIENTS, strategy, plan=plan)


def ledger(folder: Path) -> dict:
    return json.loads((folder / "ledger.json").read_text())


def test_clients_are_drawn_by_coins_and_every_version_is_paid_for(tmp_path):
    done = start(tmp_path, rounds=12)
    sizes = [
        len([e for e in done.events_of("accept") if e["version"] == version])
        for version in range(12)
    ]
    assert 2 < np.mean(sizes) < 6 and len(set(sizes)) > 2
    assert ledger(tmp_path)["events"] == [
        {"noise_multiplier": 1.0, "sampling_probability": 0.5, "count": 12}
    ]
    last = done.metrics[-1]
    assert last["epsilon"] == epsilon_of([Event(1.0, 0.5, 12)], 8**-1.1)
    assert last["update_norm"] is None and last["cosine"] is None, (
        "no number of single updates without noise"
    )


def test_participants_show_neither_in_the_schedule_nor_by_name(tmp_path):
    """If learning rates followed the tokens of participants, one client would affect all others."""
    done = start(tmp_path, rounds=6)
    assert {(job.version, job.plan.tokens_done) for job in done.jobs} <= {
        (version, version * 4 * scripted.JOB_TOKENS) for version in range(6)
    }
    assert all(record["tokens_by_client"] == {} == record["idle_share"] for record in done.metrics)


def test_a_version_with_an_empty_cohort_is_paid_for(tmp_path):
    done = start(tmp_path, rounds=8, pace={"rate": 0.05, "clients": 0})
    assert any(record["accepted"] == 0 for record in done.metrics[1:])
    assert done.version == 8 and ledger(tmp_path)["events"][0]["count"] == 8


def test_a_run_that_is_killed_pays_no_more_and_ends_in_the_same_weights(tmp_path):
    uninterrupted = start(tmp_path / "uninterrupted")
    with injected("accepted:9:raise"), pytest.raises(Injected):
        start(tmp_path / "interrupted")
    again = start(tmp_path / "interrupted")
    np.testing.assert_array_equal(again.params, uninterrupted.params)
    assert again.metrics[-1]["epsilon"] == uninterrupted.metrics[-1]["epsilon"]
    assert ledger(tmp_path / "interrupted") == ledger(tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"pace": {"clients": 2}, "participations": 3},
        {"pace": {"clients": 2}, "participations": 3, "bands": 2, "separation": 3},
    ],
    ids=["coins", "fixed sample", "correlated"],
)
def test_a_run_killed_between_payment_and_checkpoint_makes_the_same_release_again(tmp_path, about):
    """The release is paid for and its noise is drawn, but the new model is not yet on the disk."""
    uninterrupted = start(tmp_path / "uninterrupted", **about)
    with injected("checkpoint.begin:4:raise"), pytest.raises(Injected):
        start(tmp_path / "interrupted", **about)
    assert len(ledger(tmp_path / "interrupted")["releases"]) >= 3
    again = start(tmp_path / "interrupted", **about)
    np.testing.assert_array_equal(again.params, uninterrupted.params)
    assert ledger(tmp_path / "interrupted") == ledger(tmp_path / "uninterrupted")


@pytest.mark.parametrize("name", ["ledger.json", "privacy.key"])
def test_a_run_without_its_ledger_or_key_is_not_resumed(tmp_path, name):
    with injected("accepted:9:raise"), pytest.raises(Injected):
        start(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FedGPTError, match=f"{name} is missing"):
        start(tmp_path)


def test_a_budget_below_the_plan_ends_the_run_with_the_last_paid_model(tmp_path):
    budget = epsilon_of([Event(1.0, 0.5, 4)], 8**-1.1) + 1e-6
    with pytest.raises(
        StoppedEarly, match="the model of version 4 is the last with a charged release"
    ):
        start(tmp_path, rounds=9, target_epsilon=budget)
    from fedgpt.storage.checkpoint import Checkpoints

    assert Checkpoints(tmp_path / "checkpoints", 2).load().state.version == 4


BUFFER = {"name": "buffer", "clients": 4, "goal": 3}


def test_in_a_buffer_no_client_is_twice_in_a_sum_or_too_often_in_the_run(tmp_path):
    """DP-FedBuff: 8 clients, each in at most 3 releases of 3 updates, allow 8 releases."""
    with pytest.raises(StoppedEarly, match="the other clients have reached"):
        start(tmp_path, FedBuff(staleness="constant"), rounds=20, pace=BUFFER, participations=3)
    found = ledger(tmp_path)
    assert all(len(set(release["shares"])) == 3 for release in found["releases"])
    assert max(found["spent"].values()) == 3.0
    assert epsilon_of([Event(**event) for event in found["events"]], 8**-1.1) == pytest.approx(
        gaussian_epsilon(3**0.5, 8**-1.1)
    )


def test_stale_updates_cost_less_so_clients_may_participate_more_often(tmp_path):
    done = start(tmp_path, FedBuff(), rounds=9, pace=BUFFER, participations=3)
    staleness = [e["staleness"] for e in done.events_of("accept")]
    assert max(staleness) > 0
    spent = ledger(tmp_path)["spent"]
    counts = {
        client: sum(e["client"] == client for e in done.events_of("accept")) for client in spent
    }
    assert all(spent[client] <= 3 + 1e-9 for client in spent) and any(
        counts[c] > spent[c] + 0.4 for c in spent
    )
    assert done.metrics[-1]["epsilon"] == pytest.approx(
        gaussian_epsilon(max(spent.values()) ** 0.5, 8**-1.1), abs=1e-6
    )


def test_an_asynchronous_run_that_is_killed_has_the_same_weights_and_the_same_cost(tmp_path):
    about = {"rounds": 7, "pace": BUFFER, "participations": 5}
    uninterrupted = start(tmp_path / "uninterrupted", FedBuff(), **about)
    with injected("accepted:11:raise"), pytest.raises(Injected):
        start(tmp_path / "interrupted", FedBuff(), **about)
    again = start(tmp_path / "interrupted", FedBuff(), **about)
    np.testing.assert_array_equal(again.params, uninterrupted.params)
    assert ledger(tmp_path / "interrupted")["spent"] == ledger(tmp_path / "uninterrupted")["spent"]


@pytest.mark.parametrize("bands", [1, 2])
def test_participations_of_a_client_are_separation_versions_apart(tmp_path, bands):
    pace = {"name": "cohort", "clients": 2}
    done = start(tmp_path, rounds=8, pace=pace, separation=3, bands=bands, participations=3)
    versions: dict[str, list[int]] = {}
    for e in done.events_of("accept"):
        versions.setdefault(e["client"], []).append(e["version"])
    gaps = [b - a for times in versions.values() for a, b in pairwise(times)]
    assert gaps and min(gaps) >= 3
    assert max(len(times) for times in versions.values()) <= 3


@pytest.mark.parametrize("code, most", [("policy", 0), ("offline", 3)])
@pytest.mark.parametrize("unit", ["example", "local"])
def test_a_job_that_a_policy_refuses_is_not_charged(tmp_path, unit, code, most):
    """One whose client is offline may have been done there, and is."""

    def never(job):
        return [(1.0, Reply(job.client, job.number, error="not now", code=code))]

    o, plan = private(tmp_path, 3, {"clients": 0}, unit=unit, rng="secure")
    done = scripted.run(o, {**CLIENTS, "h": never}, plan=plan)
    charges, per_job = done.server.clients.charges, o.local.steps if unit == "example" else 1
    assert (charges["a"], charges["h"]) == (3 * per_job, most * per_job)


def test_norms_of_updates_do_not_affect_later_versions(tmp_path):
    """A limit that followed the norms of other clients would reveal these by its rejections."""

    def long(job):
        return honest(job, scale=5.0 if job.number == 2 else 0.01)

    o, plan = private(tmp_path, pace={"clients": 8})
    done = scripted.run(o, {**CLIENTS, "a": long}, plan=plan)
    assert not done.events_of("reject") and done.server.totals.norms == ()


def test_the_coins_of_a_run_are_secret(tmp_path):
    """Its options and seed do not tell who takes part."""
    one, two = (start(tmp_path / name, rng="secure") for name in "ab")
    assert {(job.client, job.version) for job in one.jobs} != {
        (job.client, job.version) for job in two.jobs
    }


def test_a_version_without_a_valid_update_does_not_end_the_run(tmp_path):
    """A run that ended would show that nobody took part."""

    def silent_once(job):
        return [] if job.version == 1 else honest(job)

    pace = {"rate": 0.5, "clients": 0, "deadline": 5.0, "minimum": 1}
    o, plan = private(tmp_path, rounds=4, pace=pace)
    done = scripted.run(o, dict.fromkeys(CLIENTS, silent_once), plan=plan)
    assert done.version == 4 and done.metrics[2]["accepted"] == 0
    assert done.metrics[2]["rejected"]["no_reply"] > 0


def test_what_a_client_measured_is_not_averaged(tmp_path):
    """Losses and norms belong to single clients; a client of another version may send some."""
    done = start(tmp_path, rounds=3)
    for name in ("update_norm", "cosine"):
        assert all(line[name] is None for line in done.metrics)
