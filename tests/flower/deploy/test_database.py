"""Flower's database: a kill while it is made, or changed for another version, does no harm."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from alembic import command
from flwr.supercore.state.alembic.utils import FLWR_STATE_BASELINE_REVISION, build_alembic_config

from fedgpt.flower.deploy import database
from fedgpt.flower.deploy.database import bring_up_to_date
from fedgpt.flower.deploy.inner import flower_app

# its process is killed in the middle of the steps
KILLED = """
import os, signal, sys
from pathlib import Path
from alembic.operations import Operations
from fedgpt.flower.deploy.database import bring_up_to_date

steps, original = [], Operations.create_index
def create_index(*arguments, **more):
    steps.append(0)
    if len(steps) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **more)
Operations.create_index = create_index
bring_up_to_date(Path(sys.argv[1]))
"""


def tables(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as one:
        return {name for (name,) in one.execute("SELECT name FROM sqlite_master")}


def killed(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), "1"], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_database_is_made_after_a_kill_in_the_middle_of_it(tmp_path):
    path = tmp_path / "link.db"
    killed(path)
    assert not path.exists() and list(tmp_path.iterdir()), "it had begun"
    flower_app(tmp_path, b"secret").state.linkstate_factory.state()
    assert {"node", "run", "message_ins"} <= tables(path)
    assert path.stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob(".link.db*"))


def test_an_older_database_keeps_its_rows_through_a_kill_and_a_second_start(tmp_path):
    path = tmp_path / "link.db"
    engine = database._engine(path)
    command.upgrade(build_alembic_config(engine), FLWR_STATE_BASELINE_REVISION)
    with closing(sqlite3.connect(path)) as one, one:
        one.execute("CREATE TABLE mine (x)")
        one.execute("INSERT INTO mine VALUES (7)")
    before = path.read_bytes()
    killed(path)
    assert path.read_bytes() == before
    bring_up_to_date(path)
    assert "run_series" in tables(path) and path.read_bytes() != before
    with closing(sqlite3.connect(path)) as one:
        assert one.execute("SELECT x FROM mine").fetchall() == [(7,)]


def test_a_current_database_is_left_alone(tmp_path):
    path = tmp_path / "link.db"
    bring_up_to_date(path)
    inode = path.stat().st_ino
    bring_up_to_date(path)
    assert path.stat().st_ino == inode
