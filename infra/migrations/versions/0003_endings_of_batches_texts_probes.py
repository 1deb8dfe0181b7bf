"""When batches ended; jobs listed by recipe; texts of projects; rows written to see whether that can be done.

Revision ID: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ID = sa.String(64)
_UNFINISHED = sa.text("finished_at IS NULL")


def upgrade() -> None:
    """Note the batches that have ended already, so that nobody is told of them, and make the tables."""
    op.add_column("batches", sa.Column("finished_at", sa.BigInteger()))
    op.execute(
        """
        UPDATE batches SET finished_at = created_at WHERE NOT EXISTS (
            SELECT 1 FROM batch_items JOIN jobs ON jobs.id = batch_items.job_id
            WHERE batch_items.batch_id = batches.id AND jobs.finished_at IS NULL
        )
        """
    )
    op.create_index("ix_batches_unfinished", "batches", ["id"], sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED)
    op.create_index("ix_jobs_listing_by_recipe", "jobs", ["tenant_id", "recipe_name", "created_at", "id"])
    op.create_table(
        "texts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_texts_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_texts"),
    )
    op.create_index("ix_texts_listing", "texts", ["tenant_id", "created_at", "id"])
    op.create_table(
        "probes",
        sa.Column("name", _ID, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_probes"),
    )


def downgrade() -> None:
    """Drop what the upgrade made."""
    op.drop_table("probes")
    op.drop_table("texts")
    op.drop_index("ix_jobs_listing_by_recipe", "jobs")
    op.drop_index("ix_batches_unfinished", "batches")
    op.drop_column("batches", "finished_at")
