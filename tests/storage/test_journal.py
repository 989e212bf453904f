"""The write-ahead log: its content after any truncation, and that its replay loses no update."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_transport import ScriptTransport, honest
from support.harness import JOB_TOKENS, STEP_TOKENS, options, run

from fedgpt.aggregate.auto import Auto
from fedgpt.aggregate.delta_sgd import DeltaSGD
from fedgpt.aggregate.fedasync import FedAsync
from fedgpt.aggregate.fedavg import FedAvg
from fedgpt.aggregate.median import Median
from fedgpt.core.errors import Interrupted, StoppedEarly
from fedgpt.core.faults import Injected, injected
from fedgpt.core.messages import ClientInfo, Job, JobTime, Plan, Reply
from fedgpt.core.options import CheckpointOptions, PaceOptions, RunOptions
from fedgpt.storage.checkpoint import Checkpoints
from fedgpt.storage.journal import HEAD, Entry, Journal, RecordedTransport, needs_journal


def entries() -> list[Entry]:
    update = np.arange(5, dtype=np.float32)
    packed = np.arange(7, dtype=np.uint8)
    replies = (
        Reply("b", 3, error="code 2: é", code="bad_encoding"),
        Reply("c", 1, "{}", packed, bytes=7),
        Reply("d", 2, "{}", -update, job_time=JobTime(measured=False)),
    )
    return [
        Entry(
            "send", jobs=(("a", 0), ("b", 3)), times=(0.5, 1.5), away=frozenset({"c"}), clients=3
        ),
        Entry(
            "receive",
            replies=(Reply("a", 0, '{"x": 1}', update, bytes=20, job_time=JobTime(2.0)),),
            times=(2.0,),
            clients=3,
        ),
        Entry("step", times=(9.25,), clients=3),
        Entry("receive", replies=replies, clients=3),
        Entry("step", times=(10.5,), clients=3),
    ]


def same(one: Entry, other: Entry) -> bool:
    if replace(one, replies=()) != replace(other, replies=()):
        return False
    pairs = list(zip(one.replies, other.replies, strict=True))
    plain = all(
        (a.client, a.number, a.header, a.error, a.code, a.bytes, a.job_time)
        == (b.client, b.number, b.header, b.error, b.code, b.bytes, b.job_time)
        for a, b in pairs
    )
    return plain and all(
        (a.payload is None) == (b.payload is None)
        and (
            a.payload is None
            or (a.payload.dtype == b.payload.dtype and np.array_equal(a.payload, b.payload))
        )
        for a, b in pairs
    )


def written(folder: Path) -> Path:
    """A log with three entries after version 4 and two after version 5."""
    journal = Journal(folder)
    for version, some in ((4, entries()[:3]), (5, entries()[3:])):
        journal.begin(version)
        for entry in some:
            journal.append(entry)
    journal.close()
    return folder


def test_entries_are_read_as_they_were_written(tmp_path):
    read = list(Journal(written(tmp_path)).read(4))
    assert len(read) == 5 and all(same(a, b) for a, b in zip(read, entries(), strict=True))
    assert len(list(Journal(tmp_path).read(5))) == 2


def test_drop_deletes_the_log_before_a_checkpoint(tmp_path):
    journal = Journal(written(tmp_path))
    journal.drop(5)
    assert [path.name for path in tmp_path.iterdir()] == ["version-00000005.log"]
    journal.clear()
    assert not list(tmp_path.iterdir())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_cut_and_any_flipped_byte_leave_a_prefix(tmp_path_factory, data):
    folder = written(tmp_path_factory.mktemp("wal"))
    path = folder / f"version-{data.draw(st.sampled_from(('00000004', '00000005')))}.log"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    cut = data.draw(st.booleans())
    if cut:
        content = content[:at]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    read = list(Journal(folder).read(4))
    before = 0 if path.name == "version-00000004.log" else 3
    assert before <= len(read) < 5 and all(
        same(a, b) for a, b in zip(read, entries(), strict=False)
    )

    journal = Journal(folder)  # new entries can be appended
    journal.begin(4 + sum(entry.call == "step" for entry in read))
    journal.append(entries()[0])
    journal.close()
    again = list(journal.read(4))
    assert len(again) == len(read) + 1 and same(again[-1], entries()[0])


def test_a_damaged_length_allocates_no_memory(tmp_path):
    path = written(tmp_path) / "version-00000004.log"
    content = path.read_bytes()
    magic, about, _, checksum = HEAD.unpack_from(content)
    path.write_bytes(HEAD.pack(magic, about, 2**62, checksum) + content[HEAD.size :])
    assert list(Journal(tmp_path).read(4)) == []


def test_a_missing_version_ends_the_log(tmp_path):
    """Entries behind the gap belong to a continuation from another checkpoint."""
    journal = Journal(written(tmp_path))
    journal.begin(7)
    journal.append(entries()[0])
    journal.close()
    assert len(list(Journal(tmp_path).read(4))) == 5
    assert not (tmp_path / "version-00000007.log").exists()
    assert list(Journal(tmp_path).read(3)) == [] and not list(tmp_path.iterdir())


def test_a_version_without_its_last_entry_ends_the_log(tmp_path):
    journal = Journal(tmp_path)
    for version, some in ((4, entries()[:2]), (5, entries()[3:])):
        journal.begin(version)
        for entry in some:
            journal.append(entry)
    journal.close()
    assert len(list(Journal(tmp_path).read(4))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["version-00000004.log"]


def test_bytes_after_the_last_entry_of_a_version_end_the_log(tmp_path):
    path = written(tmp_path) / "version-00000004.log"
    path.write_bytes(path.read_bytes() + b"F")
    assert len(list(Journal(tmp_path).read(4))) == 3
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_cut_deletes_the_last_entry_read_and_all_later_ones(tmp_path):
    journal = Journal(written(tmp_path))
    read = journal.read(4)
    for _ in range(2):
        next(read)
    journal.cut()
    assert [path.name for path in tmp_path.iterdir()] == ["version-00000004.log"]
    assert len(list(Journal(tmp_path).read(4))) == 1


def uneven(hurry: float):
    """Clients of unequal speed; `hurry` changes the order of arrival."""

    def client(at: int):
        return lambda job: honest(
            job,
            (1 + at + 0.37 * (job.number % 3)) ** hurry,
            tokens=job.plan.local_steps * STEP_TOKENS,
        )

    return {name: client(at) for at, name in enumerate("abcde")}


BUFFER = {"name": "buffer", "clients": 4}


@pytest.mark.parametrize(
    "strategy, pace",
    [
        (DeltaSGD(), BUFFER),
        (FedAsync(), {**BUFFER, "max_staleness": 2}),
        (DeltaSGD(), {**BUFFER, "goal": 3, "grace": 0.4, "dylu": True}),
        (FedAvg(), {"clients": 3, "goal": 2, "deadline": 6.5}),
        (Median(), {"clients": 4}),
    ],
    ids=["async", "fedasync", "grace and dylu", "cohort with a deadline", "median"],
)
@pytest.mark.parametrize(
    "fault", ["accepted:7", "accepted:10", "send:3", "send:9", "aggregate:4", "journal.half:20"]
)
def test_a_server_that_fails_anywhere_loses_and_repeats_no_update(tmp_path, strategy, pace, fault):
    """After the restart the fast clients are slow, so only the log can reproduce the first part."""
    o = options(tmp_path, rounds=20, **pace)
    o.checkpoint = CheckpointOptions(every=6, keep=2)
    outcomes = []
    with injected(f"{fault}:raise") as faults, pytest.raises(Injected):
        run(o, uneven(1.0), strategy, journal=True, outcomes=outcomes)
    assert faults[0].fired, "the run ended before the fault"
    from_version = Checkpoints(tmp_path / "checkpoints", 2).load().state.version
    again = run(o, uneven(-1.0), strategy, journal=True)
    assert again.version == 20
    first, second = outcomes[0].accepted, again.accepted
    begun = outcomes[0].accepted_until(from_version)
    assert second[: len(first) - begun] == first[begun:], (
        "accepted updates are accepted again, at the same time"
    )
    numbers = [(client, number) for client, number, _ in first[:begun] + second]
    assert len(numbers) == len(set(numbers)), "no update counts twice"
    asked_again = {(job.client, job.number) for job in again.jobs}
    assert not asked_again & {(client, number) for client, number, _ in first[begun:]}, (
        "no client repeats accepted work"
    )
    made = outcomes[0].events_of("reject", "version")
    while made and made[-1]["event"] != "version":
        made.pop()
    given_up = {(e["client"], e["number"]) for e in made if e["event"] == "reject"}
    assert not asked_again & given_up, "nor work that was given up"
    if not pace.get("dylu"):
        assert (
            again.server.totals.tokens_done
            == sum(m["accepted"] for m in again.metrics[1:]) * JOB_TOKENS
        )
    assert not list((tmp_path / "wal").iterdir()), "a finished run has no log"


@pytest.mark.parametrize(
    "fault", ["accepted:2", "accepted:4", "send:3", "send:9", "aggregate:1", "aggregate:9"]
)
def test_a_change_of_the_pacing_is_replayed_at_the_same_time(tmp_path, fault):
    """auto reads the real clock while it waits; after a restart the log has those times."""
    o = options(tmp_path, rounds=8)
    o.checkpoint = CheckpointOptions(every=6, keep=2)
    outcomes = []
    with injected(f"{fault}:raise"), pytest.raises(Injected):
        run(o, uneven(1.0), Auto(), journal=True, outcomes=outcomes)
    from_version = Checkpoints(tmp_path / "checkpoints", 2).load().state.version
    again = run(o, uneven(-1.0), Auto(), journal=True)
    first, begun = outcomes[0].accepted, outcomes[0].accepted_until(from_version)
    assert again.accepted[: len(first) - begun] == first[begun:]
    switched = [
        about for about in outcomes[0].events_of("pacing") if about["version"] >= from_version
    ]
    assert again.events_of("pacing")[: len(switched)] == switched
    assert switched or from_version or len(first) < 3, "the test would check nothing"


class Ticking(ScriptTransport):
    """A clock that advances at each look, and no client."""

    def __init__(self, start: float):
        super().__init__({})
        self.time = start

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def receive(self, timeout: float | None) -> list[Reply]:
        return []


def test_each_look_at_the_clock_is_replayed_and_the_clock_goes_on_from_the_last(tmp_path):
    def looks(start: float, live: int) -> list[float]:
        clock = RecordedTransport(Ticking(start), Journal(tmp_path), 0, 0.0)
        clock.send([])  # begins the log
        seen = []
        for _ in range(3):
            seen += [clock.now(), clock.now()]
            clock.receive(0.0)
        seen += [clock.now() for _ in range(live)]
        clock.close()
        return seen

    first = looks(0.0, live=0)
    *again, one, two = looks(1000.0, live=2)
    assert again == first and len(set(first)) == 6
    assert first[-1] < one < two < first[-1] + 10, "it does not advance while no server runs"


def test_an_interrupted_server_continues_within_a_version(tmp_path):
    """It stops after two of four updates; after the restart only the other two clients get jobs."""
    o = options(tmp_path, rounds=1)
    clients = {
        name: partial(honest, seconds=seconds)
        for name, seconds in zip("abcd", (1.0, 2.0, 3.0, 3.0), strict=True)
    }
    outcomes = []
    with injected("accepted:2:raise"), pytest.raises(Injected):
        run(o, clients, journal=True, outcomes=outcomes)
    again = run(o, clients, journal=True)
    assert sorted(job.client for job in again.jobs) == ["c", "d"]
    uninterrupted = run(options(tmp_path / "uninterrupted", rounds=1), clients)
    assert np.array_equal(again.params, uninterrupted.params)
    assert [a[:2] for a in again.accepted] == [("a", 0), ("b", 0), ("c", 0), ("d", 0)]


def test_an_interrupt_writes_a_checkpoint_and_keeps_the_log(tmp_path):
    """It comes with the second job of version 1, so after the first update of that version."""
    sent = []

    def watched(client):
        def answer(job):
            sent.append(job.version)
            if sent.count(1) == 2:
                raise KeyboardInterrupt
            return client(job)

        return answer

    o = options(tmp_path, rounds=3, goal=2, **BUFFER)
    o.checkpoint = CheckpointOptions(every=9)
    clients = {name: watched(client) for name, client in uneven(1.0).items()}
    outcomes = []
    with pytest.raises(Interrupted):
        run(o, clients, DeltaSGD(), journal=True, outcomes=outcomes)
    assert Checkpoints(tmp_path / "checkpoints", 2).load().state.version == 1

    def at_once(job):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(o, dict.fromkeys("abcde", at_once), DeltaSGD(), journal=True)
    starts = tmp_path / "checkpoints" / "starts.json"
    assert not starts.exists(), "a start without a new version that did not crash"
    rest = outcomes[0].accepted[2:]
    again = run(o, uneven(1.0), DeltaSGD(), journal=True)
    assert len(rest) == 1 and again.accepted[:1] == rest and again.version == 3


def test_a_run_that_stopped_early_sends_its_jobs_again(tmp_path):
    def never(job):
        return [(1.0, Reply(job.client, job.number, error="no"))]

    o = options(tmp_path, rounds=2, minimum=2)
    with pytest.raises(StoppedEarly):
        run(o, {"a": honest, "b": never}, journal=True)
    again = run(o, {"a": honest, "b": honest}, journal=True)
    assert again.version == 2


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_with_a_damaged_checkpoint_the_log_leads_to_the_same_state(tmp_path):
    """No client repeats work that was accepted after the older checkpoint."""
    o = options(tmp_path, rounds=20, **BUFFER)
    o.checkpoint = CheckpointOptions(every=6, keep=2)
    outcomes = []
    with injected("accepted:15:raise"), pytest.raises(Injected):
        run(o, uneven(1.0), DeltaSGD(), journal=True, outcomes=outcomes)
    damaged(tmp_path / "checkpoints" / "version-00000012.safetensors")
    again = run(o, uneven(-1.0), DeltaSGD(), journal=True)
    # the older checkpoint is that of version 6
    first, begun = outcomes[0].accepted, outcomes[0].accepted_until(6)
    assert not {(job.client, job.number) for job in again.jobs} & {
        (c, number) for c, number, _ in first
    }
    assert again.accepted[: len(first) - begun] == first[begun:] and again.version == 20


def test_crashes_of_starts_that_led_further_cost_no_checkpoint_and_no_update(tmp_path):
    """However many there are before the next checkpoint: each start made a version of its own."""
    o = options(tmp_path, rounds=20, **BUFFER)
    o.checkpoint = CheckpointOptions(every=9, keep=2)
    outcomes = []
    for accepted in (12, 4, 5, 6, 7):  # those of a start, with the replayed ones
        with injected(f"accepted:{accepted}:raise"), pytest.raises(Injected):
            run(o, uneven(1.0), DeltaSGD(), journal=True, outcomes=outcomes)
    again = run(o, uneven(1.0), DeltaSGD(), journal=True)
    assert not list(tmp_path.rglob("*.damaged")) and again.version == 20
    last = outcomes[-1]
    assert again.accepted[: len(last.accepted)] == last.accepted
    assert not {(job.client, job.number) for job in again.jobs} & {
        (client, number) for client, number, _ in last.accepted
    }


def test_the_log_after_a_checkpoint_from_which_three_starts_failed_is_set_aside(tmp_path):
    """Its replay could fail again. That of the log before the checkpoint loses no update."""
    o = options(tmp_path, rounds=20, **BUFFER)
    o.checkpoint = CheckpointOptions(every=6, keep=2)
    outcomes = []
    for fault in ("accepted:15", "open:1", "open:1", "open:1"):
        with injected(f"{fault}:raise"), pytest.raises(Injected):
            run(o, uneven(1.0), DeltaSGD(), journal=True, outcomes=outcomes)
    again = run(o, uneven(-1.0), DeltaSGD(), journal=True)
    assert (tmp_path / "checkpoints" / "version-00000012.damaged").exists()
    assert (tmp_path / "wal" / "version-00000012.damaged").exists()
    first = outcomes[0].accepted
    begun, kept = (outcomes[0].accepted_until(version) for version in (6, 12))
    assert again.accepted[: kept - begun] == first[begun:kept] and again.version == 20
    asked_again = {(job.client, job.number) for job in again.jobs}
    assert not asked_again & {(client, number) for client, number, _ in first[:kept]}
    assert asked_again & {(client, number) for client, number, _ in first[kept:]}


def test_a_run_that_starts_again_from_version_0_does_not_read_the_log(tmp_path):
    """It is a new run, so the replies in the log are those of another one."""
    o = options(tmp_path, **BUFFER)
    o.checkpoint = CheckpointOptions(every=0)
    with injected("accepted:3:raise"), pytest.raises(Injected):
        run(o, uneven(1.0), DeltaSGD(), journal=True)
    assert list((tmp_path / "wal").iterdir()), "there are replies that could be read"
    again = run(o, uneven(-1.0), DeltaSGD(), journal=True)
    whole = run(options(tmp_path / "whole", **BUFFER), uneven(-1.0), DeltaSGD(), journal=True)
    assert again.accepted == whole.accepted and len(again.jobs) == len(whole.jobs)


def test_the_log_is_deleted_only_after_the_last_checkpoint_is_written(tmp_path):
    o = options(tmp_path, rounds=3, **BUFFER)
    o.checkpoint = CheckpointOptions(every=2)
    outcomes = []
    with injected("checkpoint.begin:3:raise"), pytest.raises(Injected):  # after versions 0 and 2
        run(o, uneven(1.0), DeltaSGD(), journal=True, outcomes=outcomes)
    assert outcomes[0].version == 3
    again = run(o, uneven(-1.0), DeltaSGD(), journal=True)
    assert again.accepted == outcomes[0].accepted[2:], "replayed, not trained again"
    assert not list((tmp_path / "wal").iterdir()), "the run is over"


def test_a_client_that_was_away_is_away_in_the_replay(tmp_path):
    class WithoutA(ScriptTransport):
        def available(self, client: str) -> bool:
            return client != "a"

    o = options(tmp_path, rounds=3)
    o.checkpoint = CheckpointOptions(every=9)
    outcomes = []
    with injected("accepted:5:raise"), pytest.raises(Injected):
        run(o, uneven(1.0), journal=True, kind=WithoutA, outcomes=outcomes)
    again = run(o, uneven(-1.0), journal=True)
    assert again.accepted[:5] == outcomes[0].accepted
    assert [job.version for job in again.jobs if job.client == "a"] == [2], "it is back"


def test_a_payload_that_is_no_array_of_numbers_is_rejected_and_replayed_as_an_error(tmp_path):
    payloads = [b"\x80\x04", [1.0], np.array([object()])]

    def hostile(job):
        ((seconds, reply),) = honest(job)
        return [(seconds, replace(reply, payload=payloads[job.number]))]

    o = options(tmp_path, rounds=3)
    o.checkpoint = CheckpointOptions(every=9)
    clients = {**dict.fromkeys("abc", honest), "z": hostile}
    with injected("accepted:5:raise"), pytest.raises(Injected):
        run(o, clients, journal=True)
    again = run(o, clients, journal=True)
    assert again.version == 3 and again.server.totals.rejected == {"bad_encoding": 3}
    assert len([job for job in again.jobs if job.client == "z"]) == 2, "the first is replayed"


def test_a_log_is_replaced_from_the_entry_that_does_not_fit(tmp_path, caplog):
    """The next restart reads the entries written after it."""
    o = options(tmp_path, rounds=20, **BUFFER)
    o.checkpoint = CheckpointOptions(every=30)
    with injected("accepted:12:raise"), pytest.raises(Injected):
        run(o, uneven(1.0), DeltaSGD(), journal=True)
    # jobs of other lengths, as with another version of the program, do not fit the log
    o.local.steps = 2
    o.pace.clients = 3
    outcomes = []
    with injected("accepted:9:raise"), pytest.raises(Injected):
        run(o, uneven(-1.0), DeltaSGD(), journal=True, outcomes=outcomes)
    assert "the log does not match" in caplog.text
    caplog.clear()
    again = run(o, uneven(1.0), DeltaSGD(), journal=True)
    assert "the log does not match" not in caplog.text
    assert (
        again.accepted[: len(outcomes[0].accepted)] == outcomes[0].accepted and again.version == 20
    )


def test_jobs_of_other_clients_do_not_fit_the_log(tmp_path, caplog):
    o = options(tmp_path, rounds=4, clients=2)
    o.checkpoint = CheckpointOptions(every=9)
    with injected("accepted:3:raise"), pytest.raises(Injected):
        run(o, dict.fromkeys("abcdef", honest), journal=True)
    o.seed += 1  # another version of the program could draw other clients, too
    again = run(o, dict.fromkeys("abcdef", honest), journal=True)
    assert "the log does not match" in caplog.text
    assert again.version == 4 and not again.server.totals.rejected


def test_the_log_is_kept_if_clients_do_not_reconnect_in_time(tmp_path, monkeypatch):
    """The run stops with exit code 3; once its clients are connected it continues."""
    o = options(tmp_path, rounds=2)
    with injected("accepted:2:raise"), pytest.raises(Injected):
        run(o, dict.fromkeys("abc", honest), journal=True)

    def nobody(transport, timeout):
        raise StoppedEarly(f"0 of 3 clients connected within {timeout:.0f} s")

    with (
        monkeypatch.context() as patched,
        pytest.raises(StoppedEarly, match="connected within 300 s") as stopped,
    ):
        patched.setattr(ScriptTransport, "clients", nobody)
        run(o, dict.fromkeys("abc", honest), journal=True)
    assert stopped.value.exit_code == 3
    again = run(o, dict.fromkeys("abc", honest), journal=True)
    assert again.version == 2 and (again.jobs[0].client, again.jobs[0].version) == ("c", 0)


def test_the_log_of_other_clients_is_discarded(tmp_path, caplog):
    o = options(tmp_path, rounds=2)
    with injected("accepted:2:raise"), pytest.raises(Injected):
        run(o, dict.fromkeys("abc", honest), journal=True)
    again = run(o, dict.fromkeys("abcd", honest), journal=True)
    assert "the log was written with 3 clients, 4 are connected" in caplog.text
    assert again.version == 2 and len(again.jobs) == 8


@pytest.mark.parametrize(
    "clock, pace, real, journal, kept",
    [
        ("real", "cohort", False, None, False),
        ("real", "buffer", False, None, True),
        ("virtual", "buffer", True, None, False),
        ("real", "cohort", True, None, True),
        ("real", "cohort", False, True, True),
        ("real", "buffer", True, False, False),
    ],
)
def test_which_runs_keep_a_log(clock, pace, real, journal, kept):
    o = RunOptions(clock=clock, checkpoint=CheckpointOptions(journal=journal))
    o.pace.name = pace
    assert needs_journal(o, switches=False, real_clients=real) == kept


def test_a_run_whose_pacing_may_change_is_logged_on_the_real_clock_only():
    assert needs_journal(RunOptions(), switches=True, real_clients=False)
    assert not needs_journal(RunOptions(clock="virtual"), switches=True, real_clients=True)


@pytest.mark.parametrize("timed", [{"goal": 2}, {"deadline": 60.0}, {"dylu": True}])
def test_a_round_that_depends_on_time_is_logged_on_the_real_clock_only(timed):
    o = RunOptions(pace=PaceOptions(**timed))
    assert needs_journal(o, switches=False, real_clients=False)
    o.clock = "virtual"
    assert not needs_journal(o, switches=False, real_clients=False)


class Disk:
    """What a power cut leaves of a folder: synced bytes of files whose names are synced, too."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.bytes, self.names = folder, {}, set()
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self._noted)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in self.bytes.items() if name in self.names}

    def _noted(self, descriptor: int) -> None:
        self._sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.folder:
            self.names = {file.name for file in path.iterdir()}
        else:
            self.bytes[path.name] = os.fstat(descriptor).st_size


class Watched:
    """A transport that notes what is on the disk when jobs are handed to it."""

    at_once, virtual = None, False

    def __init__(self, disk: Disk):
        self.disk, self.on_disk = disk, []

    def now(self) -> float:
        return 0.0

    def clients(self, timeout: float) -> list[ClientInfo]:
        return [ClientInfo("a", 1)]

    def available(self, client: str) -> bool:
        return True

    def receive(self, timeout: float | None) -> list[Reply]:
        return [Reply("a", 0, "{}", np.zeros(3, np.float32))]

    def send(self, jobs) -> None:
        if not jobs:
            return
        folder = self.disk.folder
        assert self.disk.sizes == {path.name: path.stat().st_size for path in folder.iterdir()}, (
            "all of the log is on the disk"
        )
        self.on_disk.append([entry.call for entry in Journal(folder).read(0)])


def test_jobs_leave_after_the_log_with_them_is_on_the_disk(tmp_path, monkeypatch):
    """Also the end of the previous version's file, and the name of a new file."""
    inner = Watched(Disk(tmp_path, monkeypatch))
    transport = RecordedTransport(inner, Journal(tmp_path), 0, 0.0)
    transport.clients(1.0)
    job = Job("a", 0, 0, np.zeros(3, np.float32), Plan("run", 1, 0, 1, 1))
    transport.send([])  # the jobs in flight at the snapshot: none
    transport.send([job])
    transport.receive(None)
    transport.send([replace(job, number=1)])
    transport.receive(None)
    transport.step(1)
    transport.send([replace(job, number=2)])
    first = ["send", "receive", "send"]
    assert inner.on_disk == [["send"], first, [*first, "receive", "step", "send"]]
    transport.journal.close()
