"""When jobs start and when the server steps: the answers of each pacing to single questions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgpt.core.options import PaceOptions
from fedgpt.server.pacing import Buffer, Cohort, Progress, Roster, make_pace

CLIENTS = [f"client{i:02d}" for i in range(20)]


def roster(busy=(), away=(), clients=CLIENTS):
    return Roster(clients, set(busy), lambda client: client not in away)


def progress(**changed):
    return Progress(
        **{
            "version": 3,
            "dispatched": 7,
            "asked": False,
            "in_flight": 0,
            "accepted": 0,
            "seconds": 0.0,
            **changed,
        }
    )


@given(
    st.integers(1, 25),
    st.sets(st.sampled_from(CLIENTS)),
    st.sets(st.sampled_from(CLIENTS)),
    st.integers(0, 10**6),
)
def test_a_buffer_fills_up_with_distinct_clients_that_are_free(wanted, busy, away, dispatched):
    pace = Buffer(PaceOptions("buffer", clients=wanted), seed=1)
    chosen = pace.start(progress(in_flight=len(busy), dispatched=dispatched), roster(busy, away))
    free = set(CLIENTS) - busy - away
    assert len(set(chosen)) == len(chosen) and set(chosen) <= free
    assert len(chosen) == max(0, min(len(free), min(wanted, 20) - len(busy)))


def test_the_only_idle_client_gets_the_next_job():
    pace = Buffer(PaceOptions("buffer", clients=0), seed=1)
    assert pace.start(progress(in_flight=19), roster(busy=set(CLIENTS) - {"client07"})) == [
        "client07"
    ]


def test_the_next_client_depends_only_on_the_number_of_jobs():
    pace = Buffer(PaceOptions("buffer", clients=3), seed=1)
    at = [
        pace.start(progress(dispatched=n, version=v), roster()) for n, v in ((5, 1), (5, 9), (6, 1))
    ]
    assert at[0] == at[1] != at[2]


@pytest.mark.parametrize("options", [{"clients": 5}, {"rate": 0.4}], ids=str)
def test_the_sample_of_a_cohort_depends_only_on_seed_and_version(options):
    """So a restarted server asks the same clients again."""

    def sample(seed, **at):
        return Cohort(PaceOptions("cohort", **options), seed).start(progress(**at), roster())

    first = sample(1, version=3)
    assert sample(1, version=3, dispatched=99, seconds=5.0) == first
    assert sample(2, version=3) != first != sample(1, version=4)


def test_every_client_gets_jobs():
    pace = Buffer(PaceOptions("buffer", clients=1), seed=0)
    seen = [pace.start(progress(dispatched=n), roster())[0] for n in range(400)]
    assert {seen.count(client) > 5 for client in CLIENTS} == {True}


@pytest.mark.parametrize("goal, due_at", [(None, 1), (1, 1), (4, 4)])
def test_a_buffer_steps_at_its_goal(goal, due_at):
    pace = Buffer(PaceOptions("buffer", clients=0, goal=goal), seed=0)
    assert [pace.due(progress(accepted=n)) for n in range(6)] == [n >= due_at for n in range(6)]


@pytest.mark.parametrize("name", ["cohort", "buffer"])
def test_grace_runs_from_the_goal(name):
    pace = make_pace(PaceOptions(name, clients=0, goal=2, grace=5.0), 0)
    state = {"asked": True, "in_flight": 3}
    assert not pace.due(progress(accepted=1, seconds=100.0, **state))
    assert not pace.due(progress(accepted=2, at_goal=4.0, **state))
    assert pace.patience(progress(accepted=2, at_goal=4.0, **state)) == 1.0
    assert pace.due(progress(accepted=2, at_goal=5.0, **state))


def test_a_cohort_waits_until_a_client_is_available():
    pace = Cohort(PaceOptions(clients=3), seed=0)
    assert pace.start(progress(), roster(away=CLIENTS)) is None
    assert not pace.due(progress(asked=False))
    assert len(pace.start(progress(), roster(away=CLIENTS[1:]))) == 1


def test_a_cohort_includes_jobs_in_flight():
    """After a switch from buffer, jobs in flight count as members."""
    pace = Cohort(PaceOptions(clients=4), seed=0)
    busy = {"client01", "client02", "client03"}
    chosen = pace.start(progress(in_flight=3), roster(busy))
    assert len(chosen) == 1 and not busy & set(chosen)


def test_the_numbers_of_a_pacing():
    assert Cohort(PaceOptions(clients=8, goal=6), 0).pacing(20) == make_pace(
        PaceOptions(clients=8, goal=6), 0
    ).pacing(20)
    assert Cohort(PaceOptions(clients=0, rate=0.25), 0).pacing(20).clients == 5


def test_a_secret_coin_belongs_to_its_client_whoever_else_is_there():
    """An absent client would otherwise change which of the others take part."""
    tosses = np.random.default_rng(5).random(20)
    pace = Cohort(PaceOptions(clients=0, rate=0.4), 0, lambda version, count: tosses[:count])
    everyone = pace.start(progress(), roster())
    assert everyone == [c for c, toss in zip(CLIENTS, tosses, strict=True) if toss < 0.4]
    away, busy = {everyone[0], CLIENTS[19]}, {everyone[2]}
    left = pace.start(progress(), roster(busy, away))
    assert left == [c for c in everyone if c not in away | busy]
    numbers = Buffer(PaceOptions("buffer", clients=50), 0).pacing(20)
    assert (numbers.name, numbers.clients, numbers.goal) == ("buffer", 20, 1)


@pytest.mark.parametrize(
    "options, words",
    [
        (PaceOptions("buffer", rate=0.5), "pace.rate=0.5"),
        (PaceOptions(clients=4, goal=5), "pace.goal=5"),
        (PaceOptions(grace=1.0), "pace.grace=1.0"),
        (PaceOptions(max_staleness=3), "pace.max_staleness=3"),
    ],
)
def test_contradictory_options_are_reported(options, words):
    problems = [*options.problems(), *options.rules_of_pacing(switches=False)]
    assert any(words in problem for problem in problems)
