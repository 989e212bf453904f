"""Fault injection: a fault fires once, at its point and time, in whichever process is first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from fedgpt.core.faults import Injected, injected, parse, reach


def test_a_fault_fires_once_at_its_point_and_time():
    with injected("open:2:raise,send:1:raise") as (at_open, at_send):
        reach("open")
        reach("accepted")
        with pytest.raises(Injected, match="open"):
            reach("open")
        reach("open")
        assert (at_open.fired, at_send.fired) == (["open"], [])
    reach("send")


def test_all_processes_of_a_run_share_one_count(tmp_path):
    (first,), (second,), (third,) = (parse("open:2:raise", tmp_path) for _ in range(3))
    first.reach()
    with pytest.raises(Injected):
        second.reach()
    third.reach()


def test_a_fault_of_the_environment_kills_the_process():
    command = [sys.executable, "-c", "from fedgpt.core.faults import reach; reach('open')"]
    env = {**os.environ, "FEDGPT_FAULT": "open:1:kill"}
    assert subprocess.run(command, env=env, check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("text", ["open", "open:2", "open:0:kill", "open:x:kill", "open:1:end"])
def test_a_malformed_fault_is_refused(text):
    with pytest.raises(ValueError, match="expected point:time:action"):
        parse(text)
