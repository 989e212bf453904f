"""Fifty thousand damaged messages: each is a valid update or is rejected with a known code."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mutations import CODECS, GOOD, LIMIT, SIZE, TOKENS, check, message

from fedgpt.core.messages import Reply
from fedgpt.update.wire import REASONS, Expected

MANY = 50_000
SUPPRESSED = HealthCheck.too_slow, HealthCheck.data_too_large


def test_undamaged_messages_are_valid():
    for codec, (header, payload) in zip(CODECS, GOOD, strict=True):
        expected = Expected("run", "alice", 3, 5, SIZE, TOKENS, LIMIT, codec)
        assert check(Reply("alice", 3, header, payload), expected) == "valid"


@settings(max_examples=2000, deadline=None, suppress_health_check=SUPPRESSED)
@given(data=st.data())
def test_a_mutated_message_is_valid_or_rejected(data):
    check(*message(lambda count: data.draw(st.integers(0, count - 1))))


@pytest.mark.long
def test_fifty_thousand_mutated_messages_are_valid_or_rejected():
    seen: Counter[str] = Counter()

    @settings(max_examples=MANY, deadline=None, suppress_health_check=SUPPRESSED, database=None)
    @given(random=st.randoms(use_true_random=True))
    def many(random):
        seen[check(*message(random.randrange))] += 1

    many()
    assert seen.total() >= MANY
    assert seen["valid"] > 0 and len(seen) > 10 and seen.keys() <= {*REASONS, "valid"}, seen
