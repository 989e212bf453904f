"""Flower's database in a server's folder: made, and brought to this version of Flower, as a whole.

Flower changes its tables step by step. After a kill between two steps it cannot open the database
ever again. So the steps are done on a copy, which then takes the place of the database.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flwr.supercore.state.alembic.utils import build_alembic_config, run_migrations
from sqlalchemy import Engine, NullPool, create_engine

from fedgpt.core.files import PRIVATE, sync


def bring_up_to_date(path: Path) -> None:
    """Make the database, or change it as this version of Flower needs it; a kill leaves the old one
    or the new one.

    Raises sqlite3.Error or SQLAlchemyError for a damaged one.
    """
    if path.exists() and _is_current(_engine(path)):
        return
    copy = path.with_name(f".{path.name}")
    for left in path.parent.glob(f"{copy.name}*"):  # of a start that was killed
        left.unlink()
    copy.touch(PRIVATE)
    if path.exists():
        with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
            old.backup(new)
    run_migrations(_engine(copy))
    sync(copy)
    copy.replace(path)
    sync(path.parent)


def _engine(path: Path) -> Engine:
    return create_engine(f"sqlite:///{path.absolute()}", poolclass=NullPool)


def _is_current(engine: Engine) -> bool:
    wanted = ScriptDirectory.from_config(build_alembic_config(engine)).get_heads()
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_heads()
    return set(found) == set(wanted)
