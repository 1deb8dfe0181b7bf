"""Jobs say themselves that others wait for them.

Revision ID: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Mark the jobs that others were waiting for."""
    op.add_column("jobs", sa.Column("awaited", sa.Integer(), nullable=False, server_default=sa.text("0")))
    op.execute("UPDATE jobs SET awaited = 1 WHERE id IN (SELECT depends_on FROM job_deps)")


def downgrade() -> None:
    """Forget it; job_deps says the same."""
    op.drop_column("jobs", "awaited")
