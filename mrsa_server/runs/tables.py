"""The tables of the store, as its queries see them; `mrsa_server.migrations` makes them. Times are Unix seconds."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
)

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("run_id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("effort", Text),
    Column("priority", BigInteger, nullable=False),
    Column("background", Boolean, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("deadline_at", Double),
    Column("ended_at", Double),
    Column("idempotency_key", Text, unique=True),
    Column("body_digest", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("result", LargeBinary),
    Column("error", LargeBinary),
    Column("events", Integer, nullable=False),  # the last number
    Column("owner", Text),
    Column("fence", BigInteger, nullable=False),
    Column("lease_until", Double, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
)
# Pages of the list are read along this, and the lost runs along the other, which holds the unfinished alone.
Index("runs_by_age", runs.c.created_at, runs.c.run_id)
_unfinished = runs.c.ended_at.is_(None)
Index("runs_by_lease", runs.c.lease_until, sqlite_where=_unfinished)  # on Postgres too: to say so loads its dialect
Index("runs_by_end", runs.c.ended_at)

events = Table(
    "events",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("kind", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
)

traces = Table(
    "traces",
    metadata,
    Column("run_id", Text, ForeignKey("runs.run_id", ondelete="CASCADE"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("index", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)
