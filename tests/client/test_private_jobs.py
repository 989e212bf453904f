"""Jobs of a private client, done as in a run: whose noise an update has, and what is charged."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.here import tiny_run

from fedgpt.client.account import SiteAccount
from fedgpt.client.policy import PrivacyLimits
from fedgpt.client.work import ClientWork
from fedgpt.config import compose
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import RunOptions


@pytest.fixture(params=["example", "local"])
def options(request, tmp_path) -> RunOptions:
    noise = ["privacy.noise_multiplier=3", "privacy.target_epsilon=null"]
    return compose.load([*tiny_run(tmp_path), f"privacy={request.param}", *noise])


def first_job(work: ClientWork) -> tuple[np.ndarray, float]:
    """The update of ann's first job, and the number of releases that her ledger has after it."""
    params = np.zeros(work.trainer.layout.size, np.float32)
    plan = Plan("run", 1, 0, 32, 640, noise_multiplier=3.0, participations=9, delta=1e-3)
    header, update = work.train(Job("ann", 0, 0, params, plan), 0)
    return update.copy(), json.loads(header)["metrics"]["charged"]


def test_the_noise_of_an_update_comes_from_its_clients_own_key(options, tmp_path):
    one, again, other = (
        first_job(ClientWork(options, str(tmp_path / name)))[0] for name in ("one", "one", "other")
    )
    np.testing.assert_array_equal(one, again)
    # the same text, in a folder with another key
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


def test_a_job_whose_result_may_differ_in_a_bit_is_charged_again(options, tmp_path, monkeypatch):
    """The same noise on another gradient would show the difference of both."""
    work = ClientWork(options, str(tmp_path / "clients"))

    def charged() -> float:
        return first_job(work)[1]

    assert charged() == charged() == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert charged() == 2
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert charged() == 3
    # not every condition is known on a GPU, so there even the same job counts as another
    work.trainer.compute = replace(work.trainer.compute, device="cuda")
    assert [charged(), charged()] == [4, 5]


@pytest.mark.parametrize("length", [["rounds=2"], ["rounds=8", "privacy.separation=4"]])
def test_a_site_is_charged_for_a_run_with_client_privacy_and_again_beyond_its_jobs(
    tmp_path, length
):
    """Both runs have noise for two participations."""
    budget = ["privacy=client", "privacy.target_epsilon=2", "privacy.delta=1e-3", *length]
    o = compose.load([*tiny_run(tmp_path), *budget])
    account = SiteAccount(tmp_path / "state", PrivacyLimits())
    work = ClientWork(o, str(tmp_path / "state" / "runs"), account=account)
    params = np.zeros(work.trainer.layout.size, np.float32)

    def spent(number: int, first: float = 0.0) -> float:
        start = params.copy()
        start[0] = first
        work.train(Job("ann", number, number, start, Plan("run", 1, 0, 32, 640)), 0)
        return account.read().epsilon(0.1)

    # the last two jobs have the numbers of earlier ones, and are others
    jobs = [(0, 0.0), (0, 0.0), (1, 0.0), (1, 0.5), (0, 0.5)]
    assert [spent(*one) for one in jobs] == [2, 2, 2, 4, 4]
