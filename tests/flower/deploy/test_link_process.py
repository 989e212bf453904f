"""The link as a child process: what its end says about another start."""

from __future__ import annotations

import sys

import pytest
from support.deployment import deployment

from fedgpt.flower.deploy.link_process import LinkProcess


@pytest.mark.parametrize(
    "program, refused",
    [
        ("raise SystemExit(1)", True),  # with a message, such as of a port in use
        ("raise SystemExit(2)", True),
        ("import os; os.kill(os.getpid(), 9)", False),
        ("import os; os.kill(os.getppid(), 9); os.read(0, 1)", False),  # its keeper
    ],
)
def test_a_first_start_that_was_killed_says_nothing_about_the_next_one(tmp_path, program, refused):
    link = LinkProcess(deployment(tmp_path).folder)
    link.command = [sys.executable, "-c", program]
    assert link.start(lambda: False).startswith("it ended with exit code")
    assert link.has_refused == refused
    link.end()
