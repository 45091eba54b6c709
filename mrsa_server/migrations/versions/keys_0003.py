"""Whose runs, files and batches are whose: the API key that asked."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns. What is from before, or by a version that knows none, is for keys with `admin` alone."""
    for table in ("runs", "files", "batches"):
        op.add_column(table, sa.Column("key_id", sa.Text))
    op.create_index("runs_by_key", "runs", ["key_id", "created_at", "run_id"])


def downgrade() -> None:
    """Take them away: then everybody sees everything."""
    op.drop_index("runs_by_key", "runs")
    for table in ("runs", "files", "batches"):
        op.drop_column(table, "key_id")
