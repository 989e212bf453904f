"""The watchdog ends a process whose job hangs, and prints where; slow jobs are not ended."""

from __future__ import annotations

import subprocess
import sys
import time


def process(seconds: float, slow: float, sleep: float) -> tuple[int, str, float]:
    script = (
        f"import time\nfrom fedgpt.client.work import watchdog\nwith watchdog({seconds}, {slow}):\n"
    )
    script += f"    began = time.monotonic(); time.sleep({sleep})\nprint('through')"
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


def test_zero_seconds_disable_the_watchdog():
    assert process(0.0, 0.0, 0.5)[0] == 0
