"""The pool as a Flower Grid; after it no process, descriptor or shared memory is left."""

import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedgpt.core.messages import JobTime
from fedgpt.flower.pool.grid import PoolGrid
from fedgpt.flower.pool.shared_memory import array_record
from fedgpt.flower.pool.workers import WorkerSettings

SUPPORT = Path(__file__).resolve().parents[2] / "support"
APP = "toy_app:app"
CLIENTS, WORKERS = 40, 2
LONG = 30.0  # seconds; limits every wait, and all are expected to be much shorter


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return quiet | {"FLWR_HOME": str(tmp_path_factory.mktemp("flwr")), "PYTHONPATH": str(SUPPORT)}


@pytest.fixture(scope="module")
def shared_grid(environment):
    with PoolGrid(
        CLIENTS, WorkerSettings(APP, WORKERS, 1, {"hello": "world"}, environment)
    ) as made:
        yield made


@pytest.fixture
def grid(shared_grid):
    yield shared_grid
    assert not shared_grid.wait(LONG), "a test left a reply behind"


def request(node=1000, *, do="", arrays=None, ttl=None, seconds=0.0, kind=MessageType.TRAIN):
    content = RecordDict(
        {"config": ConfigRecord({"do": do, "seconds": seconds, "raw": b"\x01\x00"})}
    )
    if arrays is not None:
        content["params"] = arrays
    return Message(content, node, kind, ttl=ttl)


def ask(grid, *messages):
    replies = grid.send_and_receive(messages, timeout=LONG)
    assert len(replies) == len(messages)
    by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
    return [by_id[message.metadata.message_id] for message in messages]


def metric(reply, name):
    return reply.content["metrics"][name]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=LONG):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(0.02)


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def descriptors() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_arrays_are_sent_and_returned(grid):
    assert isinstance(grid, Grid)
    values = {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int8),
        "e": np.zeros((0, 4)),
    }
    (reply,) = ask(grid, request(1007, arrays=array_record(values)))
    back = {key: array.numpy() for key, array in reply.content["params"].items()}
    assert list(back) == list(values)
    for key, value in values.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        np.testing.assert_array_equal(back[key], value + 1)
        assert not back[key].flags.writeable and not back[key].flags.owndata
    assert (
        metric(reply, "writeable") == 0
        and metric(reply, "partition") == 7
        and metric(reply, "threads") == 1
    )


def test_metadata_of_replies(grid):
    message = request(1003)
    ids = grid.push_messages([message])
    assert ids == [message.metadata.message_id]
    assert grid.wait(LONG)
    (reply,) = grid.pull_messages(ids)
    assert not grid.pull_messages(ids)  # each reply once
    assert reply.metadata.reply_to_message_id == ids[0] != reply.metadata.message_id != ""
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (1003, 1)
    assert reply.metadata.run_id == grid.run.run_id and reply.metadata.message_type == "train"
    assert 0 < reply.metadata.ttl < message.metadata.ttl


def test_workers_share_the_gpus_and_a_replacement_gets_the_gpu_of_its_predecessor(environment):
    with PoolGrid(4, WorkerSettings(APP, 4, 1, {}, environment, ["5", "7"])) as grid:

        def gpus() -> list[int]:
            seen: dict[int, int] = {}
            while len(seen) < 4:  # some workers are still starting
                replies = ask(
                    grid, *(request(node, do="sleep", seconds=0.2) for node in grid.get_node_ids())
                )
                seen = {metric(reply, "pid"): metric(reply, "gpu") for reply in replies}
            return sorted(seen.values())

        assert gpus() == [5, 5, 7, 7]
        assert ask(grid, request(do="die"))[0].has_error() and gpus() == [5, 5, 7, 7]


def test_context_and_records_of_other_types(grid):
    for _ in range(2):
        (reply,) = ask(grid, request(1005, kind=MessageType.QUERY))
        answer = reply.content["answer"]
        assert (answer["run"], answer["node"], answer["hello"], answer["raw"]) == (
            1,
            1005,
            "world",
            b"\x00\xff",
        )
        assert (answer["clients"], answer["flags"], answer["states"]) == (CLIENTS, [True, False], 0)
        assert reply.content["echo"]["raw"] == b"\x01\x00"


def test_more_messages_than_workers_and_the_order_of_replies(grid):
    nodes = grid.get_node_ids()
    assert nodes == list(range(1000, 1000 + CLIENTS)) and len(list(grid.get_nodes())) == CLIENTS
    ids = grid.push_messages(request(node) for node in nodes)  # a generator works
    assert len(set(ids)) == CLIENTS
    replies = []
    while len(replies) < CLIENTS:
        assert grid.wait(LONG, ids)
        some = grid.pull_messages(reversed(ids))
        positions = [ids.index(reply.metadata.reply_to_message_id) for reply in some]
        assert positions == sorted(positions, reverse=True)  # in the order asked for
        replies += some
    assert {metric(reply, "partition") for reply in replies} == set(range(CLIENTS))
    assert len({metric(reply, "pid") for reply in replies}) <= WORKERS


def test_one_array_for_many_messages_is_written_once(grid):
    params = array_record({"w": np.zeros(100_000)})
    replies = ask(grid, *(request(1000 + i, arrays=params) for i in range(8)))
    assert len({metric(reply, "inode") for reply in replies}) == 1
    assert not grid._broadcasts  # and is freed with the last of them
    (later,) = ask(grid, request(arrays=params))
    assert metric(later, "inode") != metric(replies[0], "inode")


def test_two_versions_in_flight_at_once(grid):
    old, new = (array_record({"w": np.full(1000, value)}) for value in (1.0, 5.0))
    replies = ask(grid, *(request(1000 + i, arrays=old if i % 2 else new) for i in range(6)))
    assert [reply.content["params"]["w"].numpy()[0] for reply in replies] == [6.0, 2.0] * 3


def test_a_client_that_raises_is_an_error_reply(environment, capfd):
    with PoolGrid(CLIENTS, WorkerSettings(APP, 1, 1, {}, environment)) as grid:
        bad, none, good = ask(grid, request(do="raise"), request(do="nothing"), request())
    assert bad.error.code == 2 and bad.error.reason == "KeyError: 'no such thing'"
    assert none.error.code == 2 and "NoneType" in none.error.reason
    assert good.has_content()
    assert "Traceback" in capfd.readouterr().err  # on the worker's own stderr


def test_a_message_to_an_unknown_node_is_an_error_reply(grid):
    low, high, good = ask(grid, request(999), request(1000 + CLIENTS), request())
    assert low.error.code == high.error.code == 5 and good.has_content()


def test_only_requests_can_be_pushed(grid):
    (reply,) = ask(grid, request())
    with pytest.raises(ValueError, match="only a request"):
        grid.push_messages([request(), reply])
    assert not grid.wait(LONG)  # none of them was queued


@pytest.mark.parametrize(("do", "how"), [("die", "SIGKILL"), ("exit", "exit code 7")])
def test_a_worker_that_dies_is_replaced(grid, do, how):
    processes = len(children())
    before = {
        metric(reply, "pid")
        for reply in ask(grid, *(request(seconds=0.05, do="sleep") for _ in range(8)))
    }
    (reply,) = ask(grid, request(do=do))
    assert reply.error.code == 8 and how in reply.error.reason
    pids = set()

    def both_work():
        pids.update(
            metric(r, "pid")
            for r in ask(grid, *(request(do="sleep", seconds=0.05) for _ in range(4)))
        )
        return bool(pids - before)

    wait_until(both_work)
    assert len(children()) == processes  # the dead one was reaped


def test_a_client_that_hangs_is_ended_at_its_ttl(grid):
    processes = len(children())
    hung = request(do="sleep", seconds=600, ttl=0.5)
    waiting = [request(1001 + i) for i in range(3)]
    replies = ask(grid, hung, *waiting)
    assert replies[0].error.code == 4 and "ttl" in replies[0].error.reason
    assert all(reply.has_content() for reply in replies[1:])
    wait_until(lambda: grid.pull_messages([]) == [] and len(children()) == processes)


def test_a_message_that_waits_longer_than_its_ttl_is_an_error_reply(grid):
    busy = [request(do="sleep", seconds=1.0) for _ in range(WORKERS)]
    late = request(ttl=0.3)
    *_, reply = ask(grid, *busy, late)
    assert reply.error.code == 3 and "in the queue" in reply.error.reason


def test_a_reply_that_is_not_pulled_within_its_ttl_is_freed(grid):
    before = descriptors()
    ids = grid.push_messages([request(ttl=4.0, arrays=array_record({"w": np.zeros(10)}))])
    assert grid.wait(LONG)
    assert descriptors() == before + 1  # the reply's memory
    time.sleep(4.1)
    (reply,) = grid.pull_messages(ids)
    assert reply.error.code == 4 and descriptors() == before


def test_discarded_messages_have_no_reply(grid):
    ids = grid.push_messages([request(do="sleep", seconds=0.3) for _ in range(6)])
    grid.discard(ids)
    assert ask(grid, request())[0].has_content() and grid.pull_messages(ids) == []
    hung = grid.push_messages([request(do="sleep", seconds=600, ttl=0.4) for _ in range(WORKERS)])
    grid.discard(hung)
    (reply,) = ask(grid, request())  # the running one's ttl frees the worker
    assert reply.has_content() and not grid.wait(0)


def test_wait_is_bounded(grid):
    assert not grid.wait()  # nothing is queued or running: returns at once
    ids = grid.push_messages([request(do="sleep", seconds=0.5)])
    assert not grid.wait(0.05)
    hung = request(do="sleep", seconds=600, ttl=1.0)
    assert grid.send_and_receive([hung], timeout=0.05) == []
    assert grid.wait(LONG, ids) and len(grid.pull_messages(ids)) == 1
    assert grid.wait(LONG)  # the abandoned one: ended at its ttl
    assert grid.pull_messages([hung.metadata.message_id])[0].has_error()


def test_sending_does_not_wait_for_a_worker_that_does_not_read(environment):
    with PoolGrid(4, WorkerSettings(APP, 1, 1, {}, environment)) as grid:
        pid = metric(ask(grid, request())[0], "pid")
        os.kill(pid, signal.SIGSTOP)
        big = request()
        big.content["config"]["raw"] = bytes(4 << 20)  # far more than the buffer of a socket
        ids = grid.push_messages([big])
        assert not grid.wait(0.2)
        os.kill(pid, signal.SIGCONT)
        assert grid.wait(LONG) and grid.pull_messages(ids)[0].has_content()


def test_the_server_does_not_grow_with_messages_in_flight(grid):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 10_000_000
    params = array_record({"w": np.ones(size // 4, np.float32)})
    start, peak = resident(), 0
    missing = set(
        grid.push_messages([request(1000 + i % CLIENTS, arrays=params) for i in range(64)])
    )
    while missing:
        assert grid.wait(LONG)
        for message_id in list(missing):
            for reply in grid.pull_messages([message_id]):
                assert reply.content["params"]["w"].numpy().sum() == size // 2
                missing.remove(message_id)
                peak = max(peak, resident())
                del reply
    assert peak - start < 5 * size


def test_close_ends_processes_and_frees_memory(environment):
    before, processes, visible = descriptors(), children(), sorted(Path("/dev/shm").iterdir())
    grid = PoolGrid(4, WorkerSettings(APP, 2, 1, {}, environment))
    ask(grid, *(request(1000 + i, arrays=array_record({"w": np.zeros(1000)})) for i in range(4)))
    grid.push_messages(
        [
            request(do="sleep", seconds=600, arrays=array_record({"w": np.zeros(9)}))
            for _ in range(5)
        ]
    )
    grid.close()
    grid.close()
    assert children() == processes and descriptors() == before
    assert sorted(Path("/dev/shm").iterdir()) == visible
    with pytest.raises(RuntimeError, match="closed"):
        grid.push_messages([request()])


def test_close_while_workers_are_starting(environment):
    before, processes = descriptors(), children()
    PoolGrid(4, WorkerSettings(APP, 2, 1, {}, environment)).close()
    assert children() == processes and descriptors() == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module:app", "No module named 'no_such_module'"),
        ("toy_app:nothing", "no attribute"),
        ("toy_app:not_an_app", "not a ClientApp"),
    ],
)
def test_the_error_for_an_app_that_cannot_be_loaded_has_the_reason(environment, name, text):
    with PoolGrid(4, WorkerSettings(name, 3, 1, {}, environment)) as grid:
        grid.push_messages([request()])
        with pytest.raises(RuntimeError, match="(?s)no worker could start.*" + text):
            grid.wait(LONG)
        with pytest.raises(RuntimeError, match=text):
            grid.pull_messages([])
    with pytest.raises(ValueError, match="num_clients=0"):
        PoolGrid(0, WorkerSettings(name, 1))


SERVER = """
import os, signal, sys
# a shell's background jobs ignore SIGINT, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
from flwr.app import ConfigRecord, Message, RecordDict
from fedgpt.flower.pool.grid import PoolGrid
from fedgpt.flower.pool.workers import WorkerSettings

def content(do):
    return RecordDict({"config": ConfigRecord({"do": do, "seconds": 600.0})})

grid = PoolGrid(4, WorkerSettings("toy_app:app", 2))
pids = set()
while len(pids) < 2:
    replies = grid.send_and_receive([Message(content(""), 1000, "train") for _ in range(8)])
    pids |= {reply.content["metrics"]["pid"] for reply in replies}
grid.push_messages([Message(content("sleep"), 1000, "train")])  # one worker is busy, one is idle
print(*pids, flush=True)
if sys.argv[1] == "leave":
    os.kill(pids.pop(), signal.SIGSTOP)  # a worker that cannot end itself
    sys.exit(0)
grid.wait(600)
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("kill", -signal.SIGKILL),
        ("interrupt", -signal.SIGINT),
        ("terminate", -signal.SIGTERM),
        ("leave", 0),
    ],
)
def test_workers_end_with_the_server(environment, how, code):
    # the server is not in a file and has no main guard: a user's script needs none
    root = str(SUPPORT.parents[1])
    env = {**os.environ, **environment, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{root}"}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, how],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    try:
        pids = [int(pid) for pid in server.stdout.readline().split()]
        assert len(pids) == 2
        if how == "kill":
            server.kill()
        elif how == "interrupt":
            os.killpg(server.pid, signal.SIGINT)
        elif how == "terminate":
            server.terminate()
        wait_until(lambda: not any(alive(pid) for pid in pids) and server.poll() is not None)
        _, errors = server.communicate(timeout=LONG)
        assert server.returncode == code
        # the server's, not the workers'
        assert errors.count(b"KeyboardInterrupt") == (how == "interrupt")
    finally:
        with suppress(ProcessLookupError):  # workers that are left would hold the pipes open
            os.killpg(server.pid, signal.SIGKILL)
        server.communicate(timeout=LONG)


def test_workers_wait_for_a_slower_reader(grid):
    """Unread replies must not fill the memory, but a caller that waits for one of them gets it."""
    ids = grid.push_messages([request(1000 + i) for i in range(12)])
    assert grid.wait(LONG)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        unread = grid.ready()
        assert len(unread) <= 2 * WORKERS, "one for each worker, and one that each was at work on"
    assert len(unread) < len(ids)
    assert grid.wait(LONG, [ids[-1]]), "the last one arrives although the others are unread"
    replies = []
    while len(replies) < len(ids):
        assert grid.wait(LONG)
        replies += grid.pull_messages(grid.ready()[:1])
    assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)


def test_the_time_of_a_job_excludes_its_time_in_the_queue(environment):
    with PoolGrid(3, WorkerSettings(APP, 1, 1, {}, environment)) as grid:
        began = time.monotonic()
        ids = grid.push_messages([request(1000 + i, do="sleep", seconds=0.4) for i in range(3)])
        assert not time_of(grid, ids[0]).measured, "the first job includes the start of its worker"
        took = [time_of(grid, later).seconds for later in ids[1:]]
        assert min(took) >= 0.4
        # the jobs run one after another, so with the time in the queue their sum would be longer
        assert sum(took) <= time.monotonic() - began
        assert grid.time_of(ids[0]) == JobTime(), "its reply has been pulled"


def time_of(grid: PoolGrid, message_id: str) -> JobTime:
    assert grid.wait(LONG, [message_id])
    took = grid.time_of(message_id)
    grid.pull_messages([message_id])
    return took
