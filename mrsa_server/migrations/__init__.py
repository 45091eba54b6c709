"""The schema of the store, step by step, with Alembic. A new step is a file in `versions`, named for what it brings.

A step must leave the tables readable by the version before it: replicas are exchanged one after the other.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

_LOCK = 0x6D727361  # any number of our own: one upgrade at a time


def head() -> str:
    """The revision that this version needs."""
    found = _scripts().get_current_head()
    assert found is not None  # there is a first step
    return found


def knows(revision: str | None) -> bool:
    """Whether a revision can be upgraded from here."""
    return revision is None or revision in {script.revision for script in _scripts().walk_revisions()}


def current(connection: Connection) -> str | None:
    """The revision that a database is at; None for one without tables."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection) -> None:
    """Bring a database to `head`, all within the transaction that the connection is in."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
