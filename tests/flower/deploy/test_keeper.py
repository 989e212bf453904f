"""The keeper of a program: nothing outlives it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.world import wait_until

from fedgpt.flower.deploy import keeper
from fedgpt.flower.processes import Watched, _alive, _descendants

# a program that has a child in a session of its own, as Flower's have
PROGRAM = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""
SECONDS = 60.0  # bounds every wait


@pytest.fixture
def kept() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", keeper.__name__, sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: len(_descendants(process.pid)) == 2, SECONDS)
        below = _descendants(process.pid)
        try:
            yield process
        finally:
            process.kill()
            for pid in filter(_alive, below):
                os.kill(pid, signal.SIGKILL)


def test_the_program_and_what_it_started_end_with_the_keepers_input(kept):
    below = _descendants(kept.pid)
    kept.stdin.close()
    kept.wait(SECONDS)
    assert not any(map(_alive, below))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills the child of a killed parent")
def test_the_program_ends_when_the_keeper_is_killed(kept):
    program = _descendants(kept.pid)[0]
    kept.kill()
    kept.wait(SECONDS)
    wait_until(lambda: not _alive(program), SECONDS)


def test_a_process_below_another_is_watched_from_when_it_is_seen(tmp_path):
    script = tmp_path / "the-server"
    script.write_text("import time; time.sleep(600)")
    watched = Watched(os.getpid(), script.name)
    assert not watched.has_ended(), "it has not begun"
    with subprocess.Popen([sys.executable, str(script)]) as process:
        wait_until(lambda: not watched.has_ended() and watched._pid == process.pid, SECONDS)
        # Flower starts another one where the first is too slow
        with subprocess.Popen([sys.executable, str(script)]) as other:
            process.kill()
            process.wait(SECONDS)
            assert not watched.has_ended() and watched._pid == other.pid
            other.kill()
            other.wait(SECONDS)
            assert watched.has_ended()
