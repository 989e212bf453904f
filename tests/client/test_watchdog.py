"""The watchdog ends a process whose job hangs, and prints where; slow jobs are not ended."""

from __future__ import annotations

import faulthandler
import subprocess
import sys
import time

from support.here import tiny_run

from fedgpt.client.work import ClientWork, watchdog
from fedgpt.config import compose
from fedgpt.core.flat import flatten
from fedgpt.core.messages import Job, Plan
from fedgpt.model.gpt import GPT


def process(seconds: float, slow: float, sleep: float, after: float = 0) -> tuple[int, str, float]:
    script = (
        f"import time\nfrom fedgpt.client.work import watchdog\nwith watchdog({seconds}, {slow}):\n"
    )
    script += f"    began = time.monotonic(); time.sleep({sleep})\n"
    script += f"time.sleep({after})\nprint('through')"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_a_job_that_hangs_ends_its_process():
    code, output, seconds = process(0.5, 0.0, 100.0)
    assert code == 1 and "Timeout" in output and "<module>" in output and "through" not in output
    assert seconds < 90, "the job itself would take 100 s"


def test_a_slow_client_of_a_simulated_fleet_is_not_ended():
    code, output, _ = process(0.2, 60.0, 1.0)
    assert code == 0 and output == "through\n"


def test_the_time_between_two_jobs_does_not_count():
    code, output, _ = process(0.5, 0.0, 0.0, after=1.0)
    assert code == 0 and output == "through\n"


def test_zero_seconds_disable_the_watchdog():
    with watchdog(0.0):
        time.sleep(0.01)


def test_a_job_has_the_time_limit_of_its_run_and_the_time_of_its_modelled_device(
    tmp_path, monkeypatch
):
    limits = []
    monkeypatch.setattr(
        faulthandler, "dump_traceback_later", lambda seconds, exit: limits.append((seconds, exit))
    )
    options = compose.load([*tiny_run(tmp_path), "runtime.watchdog=7"])
    work = ClientWork(options, str(tmp_path / "clients"))
    params = flatten(GPT(options.model, 257))[1].numpy()
    work.train(
        Job(work.texts.shards[0].client, 0, 0, params, Plan("run", 1, 0, 32, 32, seconds=0.25)), 0
    )
    assert limits == [(7.25, True)]
