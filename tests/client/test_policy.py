"""What a site's policy refuses, and what it lets pass."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgpt.client.policy import Policy, PolicyRefused, PrivacyLimits
from fedgpt.core.messages import Job, Plan
from fedgpt.core.options import (
    LocalOptions,
    ModelOptions,
    PrivacyOptions,
    RunOptions,
    TaskOptions,
)

NOON = datetime(2026, 11, 27, 12)
CA = f"SHA256:{'a' * 43}"


def options(**changes) -> RunOptions:
    """A job of 3 steps of 4 x 2 windows of 16 tokens."""
    return RunOptions(
        model=ModelOptions(block_size=16),
        local=LocalOptions(steps=3, batch_size=4, accumulate=2),
        **changes,
    )


def job(steps: float = 3) -> Job:
    plan = Plan("run", steps, 0, 64, 1000)  # pyright: ignore[reportArgumentType]
    return Job("alice", 0, 0, np.zeros(10, np.float32), plan)


def refused(policy: Policy, o: RunOptions, steps: float = 3, now: datetime = NOON) -> str:
    """Why a job is refused; empty if it is not."""
    try:
        policy.refuse_job(o, job(steps), now)
    except PolicyRefused as error:
        return str(error)
    return ""


def test_a_site_without_a_policy_does_what_it_is_asked():
    assert refused(Policy(), options(), steps=10**9) == ""


@pytest.mark.parametrize(
    "policy, asked, said",
    [
        (Policy(runs=["night"]), {"name": "day"}, "runs=[night], and the server asks for name=day"),
        (
            Policy(tasks=["lm"]),
            {"task": TaskOptions("classify")},
            "tasks=[lm], and the server asks",
        ),
        (
            Policy(privacy=PrivacyLimits(units=["example", "local"])),
            {},
            "privacy.units=[example,local], and the server asks for privacy=none",
        ),
        (
            Policy(privacy=PrivacyLimits(None, 8.0, 1e-6)),
            {},
            "privacy.most_epsilon=8, and the server asks for privacy=none, which has no limit",
        ),
        (
            Policy(privacy=PrivacyLimits(["example"])),
            {"privacy": PrivacyOptions(unit="example", rng="seeded")},
            "asks for privacy.rng=seeded, whose noise the server knows",
        ),
        (
            Policy(privacy=PrivacyLimits(None, 8.0, 1e-6)),
            {"privacy": PrivacyOptions(unit="client", target_epsilon=1.0)},
            "privacy=client without privacy.target_epsilon and privacy.delta",
        ),
    ],
)
def test_the_reason_names_the_key_of_the_policy_and_what_the_server_asked(policy, asked, said):
    with pytest.raises(PolicyRefused, match=re.escape(said)):
        policy.refuse_run(options(**asked), NOON)
    assert said in refused(policy, options(**asked))


def test_a_server_with_another_ca_is_refused():
    Policy(servers=[CA]).refuse_server(CA)
    Policy().refuse_server("SHA256:x")
    with pytest.raises(PolicyRefused, match=re.escape(f"servers=[{CA}], and the CA is SHA256:x")):
        Policy(servers=[CA]).refuse_server("SHA256:x")


@pytest.mark.parametrize("steps", [float("nan"), float("inf"), 4])
def test_no_number_of_steps_passes_a_limit_that_it_exceeds(steps):
    assert f"most_steps=3, and the server asks for a job of {steps} steps" in refused(
        Policy(most_steps=3), options(), steps
    )
    assert "most_tokens=384" in refused(Policy(most_tokens=3 * 128), options(), steps)


@settings(deadline=None)
@given(
    limits=st.tuples(*[st.none() | st.integers(1, 10**6)] * 2),
    steps=st.integers(1, 10**4),
    shape=st.tuples(*[st.integers(1, 64)] * 3),
)
def test_a_job_is_refused_exactly_if_it_is_beyond_a_limit(limits, steps, shape):
    batch, accumulate, window = shape
    o = RunOptions(
        model=ModelOptions(block_size=window),
        local=LocalOptions(steps=steps, batch_size=batch, accumulate=accumulate),
    )
    most_steps, most_tokens = limits
    beyond = (most_steps is not None and steps > most_steps) or (
        most_tokens is not None and steps * batch * accumulate * window > most_tokens
    )
    assert bool(refused(Policy(most_steps=most_steps, most_tokens=most_tokens), o, steps)) == beyond


names = st.sampled_from(["a", "b", "c"])


@settings(deadline=None)
@given(
    runs=st.none() | st.lists(names, min_size=1),
    units=st.none() | st.lists(st.sampled_from(["none", "example", "client", "local"]), min_size=1),
    name=names,
    unit=st.sampled_from(["none", "example", "client", "local"]),
)
def test_a_run_is_refused_exactly_if_it_is_beyond_a_list(runs, units, name, unit):
    o = options(name=name, privacy=PrivacyOptions(unit=unit))
    policy = Policy(runs=runs, privacy=PrivacyLimits(units))
    beyond = (runs is not None and name not in runs) or (units is not None and unit not in units)
    assert bool(refused(policy, o)) == beyond


minutes = st.integers(0, 24 * 60 - 1)


@settings(deadline=None)
@given(begin=minutes, length=st.integers(1, 24 * 60 - 1), at=minutes)
def test_hours_may_go_over_midnight_and_a_refusal_says_when_they_begin(begin, length, at):
    end = (begin + length) % (24 * 60)
    policy = Policy(hours=f"{begin // 60}:{begin % 60:02d}-{end // 60}:{end % 60:02d}")
    now = datetime.combine(NOON, time(at // 60, at % 60, 30))
    why = refused(policy, options(), now=now)
    # walked minute by minute, as no arithmetic of the policy itself
    inside = any((begin + step) % (24 * 60) == at for step in range(length))
    assert bool(why) != inside
    if why:
        assert f"hours={policy.hours}, and it is {now:%H:%M} there" in why
        wait = int(why.rpartition(" again in ")[2].removesuffix(" s"))
        assert 0 < wait <= 24 * 3600
        assert refused(policy, options(), now=now + timedelta(seconds=wait)) == ""
        assert refused(policy, options(), now=now + timedelta(seconds=wait - 1)) != ""


def test_the_end_of_a_day_can_be_written_as_24():
    late = Policy(hours="20:00-24:00")
    assert refused(late, options(), now=datetime(2026, 11, 27, 23, 59)) == ""
    assert refused(late, options(), now=datetime(2026, 11, 28, 0, 0)) != ""
