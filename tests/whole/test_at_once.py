"""Runs that start at the same moment: with one cache, and two of them in one folder."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support.world import LONG, untimed, wait_until

from fedgpt.data.prepare import open_prepared


@pytest.mark.slow
def test_of_three_runs_at_once_the_second_in_a_folder_is_refused_and_all_use_one_cache(world):
    twice, other, cache = (world.root / f"at-once-{name}" for name in ("twice", "other", "cache"))
    command = [sys.executable, "-m", "fedgpt", "run", *world.options, "runtime=inprocess"]
    command += ["rounds=100000", "checkpoint.every=0", f"cache_dir={cache}"]
    processes = [
        subprocess.Popen(
            [*command, f"run_dir={folder}"],
            env=world.env,
            cwd=world.root,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for folder in (twice, twice, other)
    ]

    def two_train_and_one_has_ended() -> bool:
        return [process.poll() for process in processes].count(None) <= 2 and all(
            len(untimed(folder)) > 3 for folder in (twice, other)
        )

    try:
        wait_until(two_train_and_one_has_ended)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=LONG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ended = sorted(zip((process.returncode for process in processes), errors, strict=True))
    assert [code for code, _ in ended] == [1, 130, 130], errors
    assert f"fedgpt: run_dir={twice}: another fedgpt process is running" in ended[0][1]
    assert "Traceback" not in "".join(errors)
    both = list(zip(untimed(twice), untimed(other), strict=False))
    assert len(both) > 3 and all(one == another for one, another in both)
    (entry,) = [path for path in cache.iterdir() if path.is_dir()]
    open_prepared(entry)
