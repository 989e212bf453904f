"""The ledger: a release is paid for before it is made, and a restart finds all payments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.advice import advises

from fedgpt.core.errors import FedGPTError
from fedgpt.privacy.accounting import Event, epsilon_of, gaussian_epsilon
from fedgpt.privacy.ledger import BudgetExhausted, Ledger

STEP = Event(1.0, 0.02, 100)


def open_ledger(folder, fresh=False, data="d", delta=1e-5, unit="example"):
    return Ledger(folder / "ledger.json", unit, data, delta, fresh)


def test_a_new_process_in_each_round_adds_up_to_the_same_epsilon_as_one_run(tmp_path):
    open_ledger(tmp_path, fresh=True)
    found = []
    for number in range(5):
        ledger = open_ledger(tmp_path)
        ledger.charge(number, f"tag {number}", STEP, budget=3.0)
        found.append(ledger.account.epsilon)
    assert found == pytest.approx([1.427, 1.853, 2.198, 2.500, 2.773], abs=2e-3)
    assert found[-1] == epsilon_of([Event(1.0, 0.02, 500)], 1e-5), "equal events are merged"
    before = (tmp_path / "ledger.json").read_text()
    with pytest.raises(
        BudgetExhausted, match=r"from 2\.77\d to 3\.02\d, privacy\.target_epsilon=3"
    ):
        open_ledger(tmp_path).charge(5, "tag 5", STEP, budget=3.0)
    assert (tmp_path / "ledger.json").read_text() == before, "a refused charge is not paid"


def test_the_same_release_again_is_free_and_another_is_not(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True)
    ledger.charge(0, "a", STEP, None)
    once = ledger.account.epsilon
    again = open_ledger(tmp_path)
    again.charge(0, "a", STEP, None)
    assert again.account.epsilon == once
    again.charge(0, "b", STEP, None)
    assert again.account.epsilon > once


def test_each_client_pays_for_itself_and_the_largest_total_counts(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True, unit="client")
    ledger.charge_clients(0, "a", {"x": 1.0, "y": 0.25}, 4.0, most=2)
    ledger.charge_clients(1, "b", {"x": 0.5}, 4.0, most=2)
    assert open_ledger(tmp_path, unit="client").account.spent == {"x": 1.5, "y": 0.25}
    assert ledger.account.epsilon == pytest.approx(gaussian_epsilon((1.5**0.5) / 4, 1e-5), abs=1e-6)
    (event,) = json.loads((tmp_path / "ledger.json").read_text())["events"]
    assert event["count"] == 2 and event["sampling_probability"] == 1
    assert event["count"] / event["noise_multiplier"] ** 2 == pytest.approx(1.5 / 16)
    with pytest.raises(
        BudgetExhausted,
        match=r"client x would be charged for 2\.5 releases, privacy\.participations=2",
    ):
        ledger.charge_clients(2, "c", {"x": 1.0}, 4.0, most=2)


def test_the_newest_releases_are_remembered_and_older_ones_are_known_to_be_made(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("fedgpt.privacy.ledger.REMEMBERED", 3)
    ledger = open_ledger(tmp_path, fresh=True)
    for number in range(10):
        ledger.charge(number, f"tag {number}", STEP, None)
    again = open_ledger(tmp_path)
    known = [number for number in range(10) if again.known(number, f"tag {number}")]
    assert known == [7, 8, 9]
    assert all(again.made(number) for number in range(10)) and not again.made(10)


def test_releases_that_are_made_again_do_not_count_as_spent(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True, unit="client")
    ledger.charge_clients(0, "a", {"x": 1.0}, 4.0, most=3)
    ledger.charge_clients(1, "b", {"x": 0.5, "y": 1.0}, 4.0, most=3)
    before = {number: ledger.spent_before("x", number) for number in range(3)}
    assert before == {0: 0.0, 1: 1.0, 2: 1.5}
    assert ledger.spent_before("y", 1) == 0 and ledger.spent_before("y", 2) == 1


def test_a_ledger_with_a_negative_number_is_damaged(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True)
    ledger.charge(0, "a", replace(STEP, count=-100), None)  # refused by clients, see client/
    with pytest.raises(FedGPTError, match="negative numbers"):
        open_ledger(tmp_path)


def test_the_budget_holds_for_the_client_that_is_charged_most(tmp_path):
    """Two full charges at noise 4 have mu = sqrt(2) / 4; a third is beyond the budget."""
    ledger = open_ledger(tmp_path, fresh=True, unit="client")
    budget = gaussian_epsilon(2**0.5 / 4, 1e-5) * 1.001
    for number in range(2):
        ledger.charge_clients(number, f"{number}", {"x": 1.0, "y": 0.1}, 4.0, most=9, budget=budget)
    before = (tmp_path / "ledger.json").read_text()
    with pytest.raises(BudgetExhausted, match=r"privacy\.target_epsilon="):
        ledger.charge_clients(2, "2", {"x": 1.0}, 4.0, most=9, budget=budget)
    assert (tmp_path / "ledger.json").read_text() == before
    ledger.charge_clients(2, "3", {"y": 1.0}, 4.0, most=9, budget=budget)


def test_a_series_cannot_be_repeated_from_an_earlier_release(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True, unit="client")
    ledger.note(3, "a")
    ledger.note(3, "a")
    with pytest.raises(BudgetExhausted, match="release 3 of this series was made before"):
        ledger.note(3, "b")
    with pytest.raises(BudgetExhausted, match="release 2 of this series was made before"):
        ledger.note(2, "c")  # its tag may no longer be remembered


def test_a_missing_ledger_does_not_count_as_an_empty_one(tmp_path):
    with pytest.raises(FedGPTError, match="is missing: the privacy loss so far is unknown"):
        open_ledger(tmp_path)


@pytest.mark.parametrize(
    ("about", "what"),
    [
        ({"data": "other"}, "of other text; start"),  # no digest, which could confirm a guess
        ({"unit": "client"}, "of privacy=example, not client; start"),
        ({"delta": 1e-6, "data": "other"}, "of delta 1e-05, not 1e-06 and other text; start"),
    ],
)
def test_a_ledger_of_something_else_is_refused(tmp_path, about, what):
    open_ledger(tmp_path, fresh=True)
    with pytest.raises(FedGPTError, match=f"is the ledger {what}") as refused:
        open_ledger(tmp_path, **about)
    advises(refused.value, "; start a new run in another folder")
    open_ledger(tmp_path / "new", fresh=True, **about)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 9}',
        '{"format": 1, "events": 3, "charged": 3}',
        pytest.param("[" * 100_000, id="nested"),
    ],
)
def test_a_damaged_ledger_is_refused_and_left_unchanged(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(FedGPTError, match="is damaged") as refused:
        open_ledger(tmp_path, fresh=True)
    assert (tmp_path / "ledger.json").read_text() == text
    advises(refused.value, "so far is unknown; start a new run in another folder")
    open_ledger(tmp_path / "new", fresh=True)


def test_a_ledger_cut_off_anywhere_is_damaged(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True)
    ledger.charge(0, "a", STEP, None)
    text = (tmp_path / "ledger.json").read_text()
    for length in range(0, len(text) - 1, 7):
        (tmp_path / "ledger.json").write_text(text[:length])
        with pytest.raises(FedGPTError, match="is damaged"):
            open_ledger(tmp_path)


def test_a_ledger_with_a_changed_digit_is_damaged(tmp_path):
    open_ledger(tmp_path, fresh=True).charge(0, "a", STEP, None)
    path = tmp_path / "ledger.json"
    path.write_text(path.read_text().replace('"count": 100', '"count": 1'))
    with pytest.raises(FedGPTError, match="is damaged"):
        open_ledger(tmp_path)


def test_clients_cannot_continue_with_other_noise(tmp_path):
    ledger = open_ledger(tmp_path, fresh=True, unit="client")
    ledger.charge_clients(0, "a", {"x": 1.0}, 4.0, most=2)
    with pytest.raises(FedGPTError, match="is for noise 4, this run has 9") as refused:
        ledger.charge_clients(1, "b", {"x": 1.0}, 9.0, most=2)
    advises(refused.value, "this run has 9; start a new run in another folder")
    new = open_ledger(tmp_path / "new", fresh=True, unit="client")
    new.charge_clients(1, "b", {"x": 1.0}, 9.0, most=2)


def test_a_charge_that_could_not_be_written_is_not_recorded(tmp_path, monkeypatch):
    ledger = open_ledger(tmp_path, fresh=True)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedgpt.privacy.ledger.write_text", disk_full)
    with pytest.raises(OSError, match="No space left"):
        ledger.charge(0, "a", STEP, None)
    assert not ledger.known(0, "a") and ledger.account.epsilon == 0


def test_a_charge_is_on_the_disk_when_it_returns(tmp_path, monkeypatch):
    """The file is forced to the disk before it gets its name, and then the folder with the name."""
    ledger, synced = open_ledger(tmp_path, fresh=True), []

    def record(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        charged = "tag 7" in (tmp_path / "ledger.json").read_text()
        synced.append((path.name.startswith(".ledger.json."), path == tmp_path.resolve(), charged))

    monkeypatch.setattr("fedgpt.core.files.os.fsync", record)
    ledger.charge(0, "tag 7", STEP, None)
    assert synced == [(True, False, False), (False, True, True)]
