"""The client charges its ledger once per job before it trains, and enforces its own options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from filelock import FileLock
from support.private_client import TOKENS, client, events, job, options

from fedgpt.client.privacy import SETTINGS
from fedgpt.config.of_server import PARTS
from fedgpt.core.errors import FedGPTError
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.ledger import BudgetExhausted
from fedgpt.privacy.plan import make_plan
from fedgpt.privacy.randomness import SecureStream

JOBS = 20  # of each of two processes


def test_a_run_as_planned_is_within_its_budget_and_the_next_job_is_refused(tmp_path):
    o = options()
    for number in range(5):
        client(o, tmp_path).steps(job(o, number), "fresh")
    planned = make_plan(o, [TOKENS.size])
    assert events(tmp_path) == [
        {"noise_multiplier": planned.noise_multiplier, "sampling_probability": 0.1, "count": 15}
    ]
    cost = epsilon_of([Event(planned.noise_multiplier, 0.1, 15)], planned.delta)
    assert 3.9 < cost == planned.epsilon <= 4.0
    with pytest.raises(BudgetExhausted, match=r"to 4\.\d+, privacy\.target_epsilon=4"):
        client(o, tmp_path).steps(job(o, 5), "fresh")
    assert events(tmp_path)[0]["count"] == 15


def test_the_steps_have_the_noise_and_the_sampling_that_the_ledger_is_charged_for(tmp_path):
    o = options(clip=0.25)
    steps = client(o, tmp_path).steps(job(o), "fresh")
    (paid,) = events(tmp_path)
    assert steps.noise_multiplier == paid["noise_multiplier"] == job(o).plan.noise_multiplier
    assert steps.probability == paid["sampling_probability"] == 4 / 40
    assert steps.clip == 0.25 and len(steps.units) == 40


def test_a_longer_plan_is_checked_although_a_shorter_one_was_within_the_budget(tmp_path):
    o = options()
    for number in range(5):
        client(o, tmp_path).steps(job(o, number), "fresh")
    with pytest.raises(BudgetExhausted, match=r"privacy\.target_epsilon=4"):
        client(o, tmp_path).steps(job(o, 5, participations=10_000), "fresh")


def test_a_smaller_shard_is_checked_although_a_larger_one_was_within_the_budget(tmp_path):
    """Its blocks are in more batches, so the same plan costs more."""
    o, small = options(), TOKENS[: 10 * 17]
    client(o, tmp_path / "large").steps(job(o), "fresh")
    with pytest.raises(BudgetExhausted, match=r"privacy\.target_epsilon=4"):
        for number in range(5):
            client(o, tmp_path / "small", small).steps(job(o, number), "fresh")


def test_an_identical_repeat_of_a_job_is_free_and_gets_the_same_noise(tmp_path):
    o = options()
    first = client(o, tmp_path).steps(job(o), "fresh").stream.normal(50)
    again = (
        client(o, tmp_path)
        .steps(job(o, keep=(3, 4), seconds=2.0, cached_version=-1), "fresh")
        .stream.normal(50)
    )
    np.testing.assert_array_equal(first, again)
    assert events(tmp_path)[0]["count"] == 3


@pytest.mark.parametrize(
    "what", ["client", "number", "version", "params", "schedule", "moments", "environment"]
)
def test_a_job_that_differs_in_anything_is_paid_for_and_gets_other_noise(tmp_path, what):
    o = options()
    first = client(o, tmp_path).steps(job(o), "fresh").stream.normal(1000)
    other = job(o, tokens_done=64) if what == "schedule" else job(o)
    values = {"client": "bob", "number": 1, "version": 1, "params": np.ones(10, np.float32)}
    if what in values:
        other = replace(other, **{what: values[what]})
    environment = {"threads": 7} if what == "environment" else {}
    steps = client(o, tmp_path, **environment).steps(
        other, "moments of 3" if what == "moments" else "fresh"
    )
    assert abs(np.corrcoef(first, steps.stream.normal(1000))[0, 1]) < 0.13
    assert events(tmp_path)[0]["count"] == 6


@pytest.mark.parametrize("unit", ["example", "local"])
@pytest.mark.parametrize(
    "changed", ["seed", "model.dropout", "local.lr", "privacy.clip", "task.name"]
)
def test_a_repeated_job_with_other_options_is_paid_for_and_gets_other_noise(
    tmp_path, unit, changed
):
    """With the same noise, clipped to another length, two updates would show the noise."""

    def noise(o: RunOptions) -> np.ndarray:
        private, delta = client(o, tmp_path), np.zeros(1000, np.float32)
        if unit == "local":
            return private.hidden(job(o), delta, "fresh")
        return private.steps(job(o), "fresh").stream.normal(1000)

    o = options(unit, target_epsilon=100.0)
    first = noise(o)
    assert np.array_equal(first, noise(o)), "a repeat has the same noise"
    part, _, name = changed.rpartition(".")
    values = {"seed": 7, "name": "classify"}
    setattr(getattr(o, part) if part else o, name, values.get(name, 0.25))
    assert abs(np.corrcoef(first, noise(o))[0, 1]) < 0.13
    assert events(tmp_path)[0]["count"] == 2 * (3 if unit == "example" else 1)


def test_every_option_that_a_site_reads_and_that_has_an_effect_on_a_job_is_part_of_its_identity():
    without_effect = {
        *("name", "rounds", "tokens", "pace"),  # what a job has of them is in its plan
        "update",  # compresses the result with its noise
    }
    assert set(PARTS) - without_effect == {"seed", *SETTINGS}


def test_the_clients_own_budget_limits_a_server_that_asks_for_less_noise_or_more_steps(tmp_path):
    o = options()
    with pytest.raises(BudgetExhausted, match="the job has noise 0"):
        client(o, tmp_path).steps(job(o, noise_multiplier=0.0), "fresh")
    with pytest.raises(BudgetExhausted, match=r"privacy\.target_epsilon=4"):
        client(o, tmp_path).steps(job(o, noise_multiplier=0.2), "fresh")
    with pytest.raises(BudgetExhausted, match="delta nan is not below"):
        client(o, tmp_path).steps(job(o, delta=float("nan")), "fresh")
    refund = job(o)
    with pytest.raises(BudgetExhausted, match="the job has -3 steps"):
        client(o, tmp_path).steps(
            replace(refund, plan=replace(refund.plan, local_steps=-3)), "fresh"
        )
    with pytest.raises(
        BudgetExhausted, match=r"delta 0\.5 is not below 1 / 40, one over this client's units"
    ):
        client(o, tmp_path).steps(job(o, delta=0.5), "fresh")
    with pytest.raises(BudgetExhausted, match="is one of 0 jobs"):
        client(o, tmp_path).steps(job(o, participations=0), "fresh")
    with pytest.raises(BudgetExhausted, match="the job has noise inf"):
        client(o, tmp_path).steps(job(o, noise_multiplier=float("inf")), "fresh")
    # one job is still within the budget
    client(o, tmp_path).steps(job(o, participations=10_000), "fresh")
    assert events(tmp_path)[0]["count"] == 3


@pytest.mark.parametrize(("rng", "repeats"), [("secure", False), ("seeded", True)])
def test_only_seeded_noise_follows_from_the_seed(tmp_path, rng, repeats):
    o = options(rng=rng)
    new = job(o)
    one, two = (
        client(o, tmp_path / run).steps(replace(new, plan=replace(new.plan, run=run)), "fresh")
        for run in ("one", "two")
    )
    assert np.array_equal(one.stream.normal(50), two.stream.normal(50)) == repeats


@pytest.mark.parametrize("name", ["ledger.json", "privacy.key"])
def test_without_its_ledger_or_key_a_client_refuses_to_continue(tmp_path, name):
    o = options()
    client(o, tmp_path).steps(job(o), "fresh")
    (tmp_path / name).unlink()
    with pytest.raises(FedGPTError, match=f"{name} is missing"):
        client(o, tmp_path).steps(job(o, 1), "fresh")
    if name == "ledger.json":  # also if none of its updates has been accepted yet
        with pytest.raises(FedGPTError, match=f"{name} is missing"):
            client(o, tmp_path).steps(job(o, 0), "fresh")


def test_the_ledger_identifies_the_noise_without_revealing_it(tmp_path):
    o = options("local", clip=1.0)
    noise = client(o, tmp_path).hidden(job(o), np.zeros(5000, np.float32), "fresh")
    (release,) = json.loads((tmp_path / "ledger.json").read_text())["releases"]
    guess = SecureStream(bytes.fromhex(release["tag"]), "noise").normal(5000)
    assert abs(np.corrcoef(noise, guess)[0, 1]) < 0.07
    client(o, tmp_path / "other").hidden(job(o), np.zeros(5000, np.float32), "fresh")
    (other,) = json.loads((tmp_path / "other" / "ledger.json").read_text())["releases"]
    assert other["tag"] != release["tag"], "without the key no guess of the update is confirmed"


def test_a_damaged_ledger_and_one_of_other_text_are_refused(tmp_path):
    o = options()
    client(o, tmp_path).steps(job(o), "fresh")
    with pytest.raises(FedGPTError, match="is the ledger of other text;"):
        client(o, tmp_path, tokens=TOKENS[::-1].copy()).steps(job(o, 1), "fresh")
    (tmp_path / "ledger.json").write_text("{")
    with pytest.raises(FedGPTError, match="is damaged"):
        client(o, tmp_path).steps(job(o, 1), "fresh")


@pytest.mark.parametrize("unit", ["example", "local"])
def test_no_noise_is_made_for_a_job_that_could_not_be_charged(tmp_path, monkeypatch, unit):
    o, made = options(unit), []

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    private, first = client(o, tmp_path), job(o)
    monkeypatch.setattr("fedgpt.privacy.ledger.Ledger.charge", disk_full)
    monkeypatch.setattr("fedgpt.client.privacy.SecureStream", lambda *words: made.append(words))
    with pytest.raises(OSError, match="No space left"):
        if unit == "example":
            private.steps(first, "fresh")
        else:
            private.hidden(first, np.zeros(10, np.float32), "fresh")
    assert not made


def test_a_client_whose_ledger_could_not_be_created_can_start_again(tmp_path, monkeypatch):
    """A key without a ledger would look like a client whose ledger is gone."""

    def disk_full(*_, **__):
        raise OSError(28, "No space left on device")

    o = options()
    with monkeypatch.context() as patch:
        patch.setattr("fedgpt.privacy.ledger.write_text", disk_full)
        with pytest.raises(OSError, match="No space left"):
            client(o, tmp_path).steps(job(o), "fresh")
    client(o, tmp_path).steps(job(o), "fresh")
    assert events(tmp_path)[0]["count"] == 3


def test_two_processes_of_a_client_charge_its_ledger_one_after_the_other(tmp_path):
    o = options()
    other = Thread(target=lambda: client(o, tmp_path).steps(job(o), "fresh"), daemon=True)
    with FileLock(tmp_path / ".ledger.lock"):
        other.start()
        other.join(0.3)
        assert other.is_alive() and not (tmp_path / "ledger.json").exists()
    other.join(60)
    assert events(tmp_path)[0]["count"] == 3


def test_only_the_owner_can_read_the_files(tmp_path):
    o = options()
    client(o, tmp_path).steps(job(o), "fresh")
    assert {
        oct((tmp_path / name).stat().st_mode & 0o777) for name in ("ledger.json", "privacy.key")
    } == {"0o600"}


def test_a_locally_private_update_is_clipped_and_as_noisy_as_promised(tmp_path):
    o = options("local", clip=0.5, target_epsilon=None, noise_multiplier=2.0)
    delta = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    hidden = client(o, tmp_path).hidden(job(o), delta, "fresh")
    noise = hidden - 0.5 * delta / np.linalg.norm(delta)
    assert noise.std() == pytest.approx(2 * 0.5 * 2.0, rel=0.02)
    np.testing.assert_array_equal(hidden, client(o, tmp_path).hidden(job(o), delta, "fresh"))
    other = client(o, tmp_path).hidden(job(o), delta + np.float32(1e-3), "fresh")
    assert abs(np.corrcoef(hidden, other)[0, 1]) < 0.03, (
        "another update of the same job has other noise"
    )
    assert events(tmp_path) == [{"noise_multiplier": 2.0, "sampling_probability": 1.0, "count": 2}]


def pay_for_jobs(folder: Path, first: int, ready: Callable[[], object]) -> None:
    """Pay for JOBS new jobs from number `first` on, once `ready` has returned."""
    o = options(target_epsilon=None, noise_multiplier=1.0)
    private, new = client(o, folder), job(o, state_job=-1)
    ready()
    for number in range(first, first + JOBS):
        private.steps(replace(new, number=number), "fresh")


def test_two_processes_of_a_client_pay_for_each_of_their_jobs(tmp_path):
    """As if its SuperNode was started twice; they also agree on the key, which is made once."""
    command = [sys.executable, __file__, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=paths, **pipes) as other:
        assert other.stdin is not None and other.stdout is not None
        try:
            assert other.stdout.readline() == b"ready\n"
            other.stdin.close()
            pay_for_jobs(tmp_path, 0, ready=lambda: None)
            assert other.wait(60) == 0
        finally:
            other.kill()
    assert [event["count"] for event in events(tmp_path)] == [2 * JOBS * 3]
    releases = json.loads((tmp_path / "ledger.json").read_text())["releases"]
    assert sorted(release["number"] for release in releases) == list(range(2 * JOBS))


if __name__ == "__main__":  # the other process of the test above
    pay_for_jobs(Path(sys.argv[1]), JOBS, lambda: (print("ready", flush=True), sys.stdin.read()))
