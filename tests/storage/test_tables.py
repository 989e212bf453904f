"""The server's state besides the model: immutable totals, and one table of clients."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fedgpt.core.messages import Update
from fedgpt.storage.tables import Clients, RunTotals


def update(client: str, number: int, version: int = 0, tokens: int = 64) -> Update:
    return Update(client, number, version, np.zeros(1, np.float32), tokens)


def test_totals_and_their_mappings_are_immutable():
    totals = RunTotals().plus(bytes_up=3).plus_rejected("late")
    more = totals.plus_rejected("late").plus(bytes_up=4)
    assert (totals.bytes_up, dict(totals.rejected)) == (3, {"late": 1})
    assert (more.bytes_up, dict(more.rejected)) == (7, {"late": 2})
    with pytest.raises(dataclasses.FrozenInstanceError):
        totals.bytes_up = 9
    with pytest.raises(TypeError):
        totals.rejected["late"] = 9


def test_a_reply_that_answers_no_job_gets_its_reason():
    clients = Clients()
    assert [clients.take_number("a") for _ in range(3)] == [0, 1, 2]
    clients.accept(update("a", 1), 0.5)
    reasons = [clients.reason_for_stray("a", number) for number in (1, 0, 2, 3, -1)]
    assert reasons == ["duplicate", "late", "late", "unknown_job", "unknown_job"]
    assert clients.reason_for_stray("nobody", 0) == "unknown_job"


def test_an_accepted_update_is_credited_and_resets_failures():
    clients = Clients()
    assert [clients.strike("a"), clients.strike("a")] == [1, 2]
    clients.accept(update("a", 0, version=3), 0.5)
    clients.accept(update("a", 1, version=4), 0.25)
    assert (clients.tokens_trained("a"), clients.seconds_at_work("a")) == (128, 0.75)
    assert clients.cached_version("a") == 4 and clients.strike("a") == 1


def test_a_client_may_report_more_charges_than_were_counted_and_not_fewer():
    clients = Clients()
    clients.charge("a", 2.0)
    for reported, charged in ((1.0, 2.0), (5.0, 5.0)):
        clients.charged_at_least("a", reported)
        assert clients.charges == {"a": charged}


def test_later_changes_do_not_affect_a_copy_and_json_restores_it():
    clients = Clients()
    clients.accept(update("a", 0), 0.5)
    clients.remember_accepted()
    copy = clients.frozen()
    clients.accept(update("a", 1), 0.5)
    clients.rest("b", until=7)
    clients.remember_accepted(most=1)
    assert copy.accepted_number("a") == 0 and not copy.is_resting("b")
    assert copy.restorable_numbers("a") == {0} and clients.restorable_numbers("a") == {1}
    again = Clients(**json.loads(json.dumps(clients.as_json())))
    assert json.dumps(again.as_json()) == json.dumps(clients.as_json())
    with pytest.raises(KeyError):
        Clients({"no such column": {}})


def test_speeds_are_smoothed_from_the_first_measurement_on():
    clients = Clients()
    assert clients.learn_speed("a", 4.0, memory=0.5) == 4.0
    assert clients.learn_speed("a", 2.0, memory=0.5) == 3.0
    assert dict(clients.speeds) == {"a": 3.0}
