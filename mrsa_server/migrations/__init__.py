"""The schema of the store, step by step, with Alembic. A new step is a file in `versions`, named for what it brings.

A step must leave the tables readable by the version before it: replicas are exchanged one after the other.

Alembic is imported where there is something to do for it: a server whose tables are up to date does without its 8 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0002"  # the revision that this version needs: the last in `versions`
_LOCK = 0x6D727361  # any number of our own: one upgrade at a time


def knows(revision: str | None) -> bool:
    """Whether a revision can be upgraded from here."""
    if revision in (None, HEAD):
        return True
    from alembic.script import ScriptDirectory

    return revision in {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def current(connection: Connection) -> str | None:
    """The revision that a database is at; None for one without tables."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def stamp(connection: Connection) -> None:
    """Say of new tables that they are those of `HEAD`."""
    key = "CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)"
    connection.execute(text(f"CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL, {key})"))
    connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


def upgrade(connection: Connection) -> None:
    """Bring a database to `HEAD`, all within the transaction that the connection is in."""
    from alembic import command

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
