"""What a site has spent over all its runs, and that it never exceeds its limit."""

from __future__ import annotations

import json
import shutil
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from support.private_client import client, job, options

from fedgpt.client.account import FILE, MARKER, Promise, SiteAccount
from fedgpt.client.policy import PolicyRefused, PrivacyLimits
from fedgpt.client.site import Site
from fedgpt.client.state import ClientStore
from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import CorpusOptions
from fedgpt.privacy.accounting import Event

DELTA = 1e-5


def account(folder: Path, most: float | None = 3.0, delta: float = DELTA) -> SiteAccount:
    return SiteAccount(folder, PrivacyLimits(None, most, None if most is None else delta))


def epsilon(events: list[Event], delta: float = DELTA) -> float:
    """Epsilon of all the releases by dp-accounting alone."""
    counted: Any = PLDAccountant()
    for event in events:
        gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(event.sampling_probability, gaussian)
        counted.compose(sampled, event.count)
    return counted.get_epsilon(delta)


def allowed(one: SiteAccount, event: Event, planned: int) -> bool:
    try:
        one.charge(event, Event(event.noise_multiplier, event.sampling_probability, planned))
    except PolicyRefused:
        return False
    return True


events = st.builds(
    Event, st.sampled_from([0.8, 1.5, 6.0]), st.sampled_from([0.05, 0.2, 1.0]), st.integers(1, 8)
)


@pytest.mark.slow
@settings(deadline=None, max_examples=5)
@given(jobs=st.lists(st.tuples(events, st.integers(0, 30), st.booleans()), max_size=4))
def test_all_releases_together_stay_within_the_limit_and_none_is_refused_that_fits(jobs):
    """Runs of different noise and sampling take turns, and the client is started again at times."""
    with tempfile.TemporaryDirectory() as folder:
        one, made = account(Path(folder)), list[Event]()
        for event, later, restart in jobs:
            one = account(Path(folder)) if restart else one
            if allowed(one, event, event.count + later):
                made.append(event)
                assert epsilon(made) <= 3.0 * (1 + 1e-3)
            else:
                assert epsilon([*made, event]) > 3.0 * (1 - 1e-3)


def test_the_limit_holds_over_runs_and_restarts_and_when_the_folder_of_a_run_is_deleted(tmp_path):
    o, made = options(target_epsilon=1.0, delta=DELTA), 0
    for run in range(30):
        folder = tmp_path / "runs" / f"run{run}" / "alice"
        try:
            for number in range(5):
                private = client(o, folder)
                private.account = account(tmp_path)
                private.steps(job(o, number), "fresh")
                made += 1
        except PolicyRefused as error:
            assert "privacy.most_epsilon=3 for all runs together" in str(error)
            break
        if run % 2:
            shutil.rmtree(folder.parent)
    (event,) = account(tmp_path).read().events
    assert event.count == 3 * made
    assert epsilon([event]) <= 3.0 * (1 + 1e-3)
    assert epsilon([event, replace(event, count=3)]) > 3.0 * (1 - 1e-3)
    assert made > 15, "three runs of epsilon 1 and more, as they compose"


def test_a_repeated_job_is_charged_once(tmp_path):
    o = options()
    for _ in range(3):
        private = client(o, tmp_path / "runs" / "run" / "alice")
        private.account = account(tmp_path, most=None)
        private.steps(job(o), "fresh")
    (event,) = account(tmp_path).read().events
    assert event.count == 3


def test_the_message_for_the_server_has_nothing_that_depends_on_the_text(tmp_path, caplog):
    with pytest.raises(PolicyRefused) as caught:
        account(tmp_path, 0.5).charge(Event(1.0, 0.123, 7), Event(1.0, 0.123, 7))
    digits = set("".join(c if c.isdigit() or c == "." else " " for c in str(caught.value)).split())
    assert digits == {"0.5", "3600", "."}
    assert "would bring epsilon at this site from 0 to" in caplog.text
    assert not (tmp_path / FILE).exists(), "a refused job is not charged"


def test_runs_in_which_the_server_adds_the_noise_are_added_up(tmp_path):
    one = account(tmp_path)
    one.charge_job("a", Promise(1.0, 4e-6, 3), "job 0")
    one.charge_job("a", Promise(1.0, 4e-6, 3), "job 1")  # once for all its jobs
    one.charge_job("b", Promise(1.5, 4e-6, 3), "job 0")
    assert one.read().epsilon(DELTA) == pytest.approx(2.5)
    with pytest.raises(PolicyRefused):
        one.charge_job("c", Promise(0.6, 1e-7, 3), "job 0")
    with pytest.raises(PolicyRefused):  # epsilon would do, but the deltas are too large together
        one.charge_job("c", Promise(0.1, 3e-6, 3), "job 0")
    rest = epsilon([Event(20.0, 1.0, 1)], DELTA - 8e-6)
    assert 0 < rest < 0.5
    assert allowed(one, Event(20.0, 1.0, 1), 1)
    assert one.read().epsilon(DELTA) == pytest.approx(2.5 + rest, rel=1e-2)
    assert not allowed(one, Event(2.0, 1.0, 1), 1)


def spent_on(folder: Path) -> float:
    return account(folder, most=None).read().epsilon(DELTA)


def test_a_promise_holds_for_as_many_jobs_as_the_run_has_and_more_are_charged_again(tmp_path):
    """A server may take the id of an earlier run for another one."""
    promise = Promise(1.0, 1e-6, jobs=2)
    for number, spent in enumerate((1.0, 1.0, 2.0, 2.0, 3.0)):
        account(tmp_path).charge_job("run", promise, f"job {number}")
        assert spent_on(tmp_path) == spent
        account(tmp_path).charge_job("run", promise, f"job {number}")  # repeated after a crash
        assert spent_on(tmp_path) == spent
    account(tmp_path).charge_job("run", promise, "job 5")
    with pytest.raises(PolicyRefused, match="most_epsilon=3 for all runs"):
        account(tmp_path).charge_job("run", promise, "job 6")
    assert spent_on(tmp_path) == 3.0


@pytest.mark.parametrize(
    "other",
    [
        Promise(0.5, 1e-6, 9),
        Promise(0.5, 2e-6, 5),
        Promise(0.1, 1e-6, 5),
        Promise(0.5, 1e-6, 5, "x"),
    ],
)
def test_another_promise_under_the_same_id_is_charged_as_another_run(tmp_path, other):
    one = account(tmp_path)
    one.charge_job("run", Promise(0.5, 1e-6, 5), "job 0")
    one.charge_job("run", other, "job 0")
    spent = one.read()
    assert spent.epsilon(DELTA) == 0.5 + other.epsilon
    assert spent.promised["run"].delta == 1e-6 + other.delta


def test_the_same_id_of_another_server_is_another_run(tmp_path):
    for server in ("SHA256:a", "SHA256:b", "SHA256:a"):
        one = SiteAccount(tmp_path, PrivacyLimits(None, 3.0, DELTA), server)
        one.charge_job("run", Promise(1.0, 1e-6, 5), "job 0")
    assert spent_on(tmp_path) == 2.0


def test_a_server_does_not_reach_the_state_of_another_servers_run_by_taking_its_id(tmp_path):
    site = Site("ann", CorpusOptions(name="files"), str(tmp_path), str(tmp_path / "cache"))
    one, other = (replace(site, server=f"SHA256:{name}") for name in "ab")
    assert one.runs != other.runs and Path(one.runs).parent == Path(other.runs).parent
    folder = ClientStore(one.runs, "run", "ann").folder
    private = client(options(), folder)
    private.account = SiteAccount(site.state_dir, PrivacyLimits(), one.server)
    private.steps(job(options()), "fresh")
    (tmp_path / FILE).unlink()
    with pytest.raises(FedGPTError, match="is missing, and the site has made releases"):
        account(tmp_path).read()


def test_the_loss_of_the_file_is_told_where_the_server_adds_the_noise_in_every_run(tmp_path):
    """Such a run has no ledger, which would prove that there was a file."""
    account(tmp_path).charge_job("a", Promise(2.0, 1e-6, 1), "job 0")
    kept = (tmp_path / FILE).read_text()
    (tmp_path / FILE).unlink()
    for _ in range(2):
        with pytest.raises(FedGPTError, match="is missing, and the site has made releases"):
            account(tmp_path).charge_job("b", Promise(2.0, 1e-6, 1), "job 0")
    (tmp_path / FILE).write_text(kept)
    with pytest.raises(PolicyRefused):
        account(tmp_path).charge_job("b", Promise(2.0, 1e-6, 1), "job 0")


def test_an_account_of_before_there_was_a_marker_gets_one_with_its_next_charge(tmp_path):
    account(tmp_path).charge_job("a", Promise(1.0, 1e-6, 2), "job 0")
    (tmp_path / MARKER).unlink()
    account(tmp_path).charge_job("a", Promise(1.0, 1e-6, 2), "job 0")  # for which nothing is added
    assert (tmp_path / MARKER).exists()


def test_a_refused_first_job_does_not_make_a_file_that_would_be_missed(tmp_path):
    with pytest.raises(PolicyRefused):
        account(tmp_path).charge_job("a", Promise(9.0, 1e-6, 1), "job 0")
    account(tmp_path).charge_job("b", Promise(1.0, 1e-6, 1), "job 0")
    assert spent_on(tmp_path) == 1.0


def test_a_site_without_a_limit_counts_too_so_that_a_later_limit_holds(tmp_path):
    assert allowed(account(tmp_path, most=None), Event(0.5, 1.0, 3), 3)
    assert not allowed(account(tmp_path), Event(6.0, 1.0, 1), 1)


def test_only_the_owner_can_read_the_file(tmp_path):
    assert allowed(account(tmp_path), Event(6.0, 1.0, 1), 1)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("how", ["lost", "cut", "changed", "other"])
def test_a_file_that_is_lost_or_damaged_is_told_and_nothing_is_released(tmp_path, how):
    o = options()
    private = client(o, tmp_path / "runs" / "run" / "alice")
    private.account = account(tmp_path, most=None)
    private.steps(job(o), "fresh")
    file = tmp_path / FILE
    kept = file.read_text()
    if how == "lost":
        file.unlink()
    elif how == "cut":
        file.write_text(kept[:40])
    elif how == "changed":
        file.write_text(kept.replace('"count": 3', '"count": 1'))
    else:
        file.write_text(json.dumps({"format": 1}))
    with pytest.raises(FedGPTError, match="put the file back from a backup"):
        private.steps(job(o, 1), "fresh")
    file.write_text(kept)
    private.steps(job(o, 1), "fresh")
    assert account(tmp_path).read().events[0].count == 6


REMEDIES = (
    "put the file back from a backup",  # lost
    "put the file back from a backup",  # damaged
)
