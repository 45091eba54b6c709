"""Files, batches, and the runs that are lines of one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ALONE = sa.text("ended_at IS NULL AND batch_id IS NULL")
_IN_BATCH = sa.text("batch_id IS NOT NULL")
_LEFT = sa.text("ended_at IS NULL AND batch_id IS NOT NULL")
_UNFINISHED = sa.text("ended_at IS NULL")


def upgrade() -> None:
    """Make the tables, and the columns of runs. The version before it sees runs of batches as any others."""
    op.create_table(
        "files",
        sa.Column("file_id", sa.Text, primary_key=True),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("status", sa.Text, nullable=False),
    )
    op.create_index("files_by_age", "files", ["created_at", "file_id"])
    op.create_table(
        "file_chunks",
        sa.Column("file_id", sa.Text, sa.ForeignKey("files.file_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "batches",
        sa.Column("batch_id", sa.Text, primary_key=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("input_file_id", sa.Text, nullable=False),
        sa.Column("output_file_id", sa.Text),
        sa.Column("error_file_id", sa.Text),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("completion_window", sa.Text, nullable=False),
        sa.Column("output_expires_s", sa.Double),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("in_progress_at", sa.Double),
        sa.Column("finalizing_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("failed_at", sa.Double),
        sa.Column("expired_at", sa.Double),
        sa.Column("cancelling_at", sa.Double),
        sa.Column("cancelled_at", sa.Double),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("errors", sa.LargeBinary),
        sa.Column("model", sa.Text),
        sa.Column("total", sa.Integer, nullable=False),
        sa.Column("completed", sa.Integer),
        sa.Column("failed", sa.Integer),
        sa.Column("usage", sa.Text),
        sa.Column("idempotency_key", sa.Text, unique=True),
        sa.Column("body_digest", sa.LargeBinary, nullable=False),
        sa.Column("owner", sa.Text),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.Double, nullable=False),
    )
    for column in ("batch_id", "custom_id"):
        op.add_column("runs", sa.Column(column, sa.Text))
    op.add_column("runs", sa.Column("batch_line", sa.Integer))
    op.create_index(
        "runs_by_batch", "runs", ["batch_id", "batch_line"], sqlite_where=_IN_BATCH, postgresql_where=_IN_BATCH
    )
    op.create_index(
        "runs_left_in_batches", "runs", ["batch_id", "batch_line"], sqlite_where=_LEFT, postgresql_where=_LEFT
    )
    op.create_index("runs_counted", "runs", ["batch_id", "status"], sqlite_where=_IN_BATCH, postgresql_where=_IN_BATCH)
    op.drop_index("runs_by_lease", "runs")
    op.create_index("runs_by_lease", "runs", ["lease_until"], sqlite_where=_ALONE, postgresql_where=_ALONE)
    if op.get_bind().dialect.name == "postgresql":  # bodies are compressed already
        op.execute("ALTER TABLE file_chunks ALTER COLUMN body SET STORAGE EXTERNAL")


def downgrade() -> None:
    """Drop what `upgrade` made. Runs of batches become runs of their own."""
    op.drop_index("runs_by_lease", "runs")
    op.create_index("runs_by_lease", "runs", ["lease_until"], sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED)
    for index in ("runs_counted", "runs_left_in_batches", "runs_by_batch"):
        op.drop_index(index, "runs")
    for column in ("batch_line", "custom_id", "batch_id"):
        op.drop_column("runs", column)
    for table in ("batches", "file_chunks", "files"):
        op.drop_table(table)
