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
    and_,
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
    Column("batch_id", Text),
    Column("batch_line", Integer),
    Column("custom_id", Text),
)
# Pages of the list are read along this, and the lost runs along those that hold the unfinished alone.
Index("runs_by_age", runs.c.created_at, runs.c.run_id)
_in_batch = runs.c.batch_id.is_not(None)
_alone = and_(runs.c.ended_at.is_(None), runs.c.batch_id.is_(None))
_left = and_(runs.c.ended_at.is_(None), _in_batch)
_place = runs.c.batch_id, runs.c.batch_line
# Partial on Postgres too, by its migrations: to say so here would load its dialect.
Index("runs_by_lease", runs.c.lease_until, sqlite_where=_alone)
Index("runs_left_in_batches", *_place, sqlite_where=_left)
Index("runs_by_batch", *_place, sqlite_where=_in_batch)
# Clients ask again and again how far a batch is: of 50,000 lines this alone is read, in 20 ms and not in 150.
Index("runs_counted", runs.c.batch_id, runs.c.status, sqlite_where=_in_batch)
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

files = Table(
    "files",
    metadata,
    Column("file_id", Text, primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("status", Text, nullable=False),
)
Index("files_by_age", files.c.created_at, files.c.file_id)

file_chunks = Table(
    "file_chunks",
    metadata,
    Column("file_id", Text, ForeignKey("files.file_id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("batch_id", Text, primary_key=True),  # in the order in which they were made
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("output_file_id", Text),
    Column("error_file_id", Text),
    Column("status", Text, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("output_expires_s", Double),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("in_progress_at", Double),
    Column("finalizing_at", Double),
    Column("completed_at", Double),
    Column("failed_at", Double),
    Column("expired_at", Double),
    Column("cancelling_at", Double),
    Column("cancelled_at", Double),
    Column("metadata", Text, nullable=False),
    Column("errors", LargeBinary),
    Column("model", Text),
    Column("total", Integer, nullable=False),
    Column("completed", Integer),  # of its runs, once it has ended: they may be forgotten before it is
    Column("failed", Integer),
    Column("usage", Text),
    Column("idempotency_key", Text, unique=True),
    Column("body_digest", LargeBinary, nullable=False),
    Column("owner", Text),
    Column("fence", BigInteger, nullable=False),
    Column("lease_until", Double, nullable=False),
)
