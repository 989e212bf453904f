"""A client that joins while the run goes on does not move the end of the schedule."""

from __future__ import annotations

import pytest
from support.fake_transport import ScriptTransport, honest
from support.harness import options, run

from fedgpt.core.faults import Injected, injected
from fedgpt.core.messages import ClientInfo
from fedgpt.core.options import CheckpointOptions
from fedgpt.local.schedule import learning_rate

JOINS = 4.5  # when "c" joins, on the run's clock
TOKENS = 512  # of a job


class Growing(ScriptTransport):
    """Clients "a" and "b", and later "c"."""

    late = "c"

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [info for info in super().clients(timeout) if info.id != self.late]

    def newcomers(self) -> list[ClientInfo]:
        if not self.late or self.time < JOINS:
            return []
        self.late = ""
        return [ClientInfo("c", 10_000)]


class Continued(ScriptTransport):
    """All clients, as after a restart."""


def rates(jobs) -> list[float]:
    """The learning rate at the start of each job."""
    return [
        learning_rate(job.plan.tokens_done, job.plan.tokens_total, lr=1.0, min_lr=0.1, warmup=0.05)
        for job in jobs
    ]


@pytest.mark.parametrize("crash", ["", "checkpoint.committed:9:raise"])
def test_the_learning_rate_does_not_rise_again_when_a_client_joins(tmp_path, crash):
    o = options(tmp_path, rounds=12)
    o.checkpoint = CheckpointOptions(every=1)
    clients, outcomes = dict.fromkeys("abc", honest), []
    if crash:  # its checkpoint is of after the join
        with injected(crash), pytest.raises(Injected):
            run(o, clients, kind=Growing, outcomes=outcomes)
        outcomes.append(run(o, clients, kind=Continued))
    else:
        outcomes.append(run(o, clients, kind=Growing))
    jobs = [job for outcome in outcomes for job in outcome.jobs]
    assert [e["client"] for e in outcomes[0].events_of("join")] == ["c"]
    assert {job.plan.tokens_total for job in jobs} == {12 * 2 * TOKENS}
    assert max(outcome.version for outcome in outcomes) == 12
    after_warm_up = rates(jobs)[2:]
    assert after_warm_up == sorted(after_warm_up, reverse=True)
    assert after_warm_up[0] > 0.9 and after_warm_up[-1] == 0.1
    # a local step advances the schedule by the tokens of all that train, who are more now
    steps = [job.plan.tokens_per_step for job in jobs]
    assert (steps[0], steps[-1]) == (2 * 128, 3 * 128)
