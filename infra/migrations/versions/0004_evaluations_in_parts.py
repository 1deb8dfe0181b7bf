"""Evaluations in parts: what was asked for, how each part went, a report; several of one job.

Revision ID: 0004
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ID = sa.String(64)
_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")


def upgrade() -> None:
    """Add the columns, and fill them in for what was measured before."""
    with op.batch_alter_table("evaluations") as table:
        table.drop_constraint("uq_evaluations_job_id", type_="unique")
        table.add_column(sa.Column("artifact_job_id", _ID))
        table.add_column(sa.Column("fingerprint", _ID, nullable=False, server_default=sa.text("''")))
        table.add_column(sa.Column("settings", _JSON))
        table.add_column(sa.Column("parts", _JSON))
        table.add_column(sa.Column("is_complete", sa.Integer(), nullable=False, server_default=sa.text("1")))
        table.add_column(sa.Column("report_key", sa.Text()))
    op.create_index("ix_evaluations_artifact_job_id", "evaluations", ["artifact_job_id"])
    op.create_index("ix_evaluations_fingerprint", "evaluations", ["tenant_id", "fingerprint"])
    op.create_index("uq_evaluations_measured", "evaluations", ["job_id", "fingerprint"], unique=True)
    _fill_in()


def _fill_in() -> None:
    evaluations = sa.table(
        "evaluations",
        sa.column("job_id", sa.String),
        sa.column("artifact_job_id", sa.String),
        sa.column("fingerprint", sa.String),
        sa.column("settings", _JSON),
        sa.column("parts", _JSON),
    )
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("fingerprint", sa.String), sa.column("spec", _JSON))
    connection = op.get_bind()
    found = sa.select(jobs).where(jobs.c.id.in_(sa.select(evaluations.c.job_id)))
    for job in connection.execute(found).all():
        values: dict[str, Any] = {
            "artifact_job_id": job.spec.get("artifact_job_id"),
            "fingerprint": job.fingerprint,
            "settings": job.spec.get("evaluation"),
            "parts": {"perplexity": {"state": "done"}},
        }
        connection.execute(evaluations.update().where(evaluations.c.job_id == job.id).values(**values))


def downgrade() -> None:
    """Take away what the older release cannot hold: all but one evaluation of a job, and the unfinished ones."""
    op.execute("DELETE FROM evaluations WHERE is_complete = 0")
    op.execute("DELETE FROM evaluations WHERE id NOT IN (SELECT max(id) FROM evaluations GROUP BY job_id)")
    op.drop_index("uq_evaluations_measured", "evaluations")
    op.drop_index("ix_evaluations_fingerprint", "evaluations")
    op.drop_index("ix_evaluations_artifact_job_id", "evaluations")
    with op.batch_alter_table("evaluations") as table:
        for column in ("report_key", "is_complete", "parts", "settings", "fingerprint", "artifact_job_id"):
            table.drop_column(column)
        table.create_unique_constraint("uq_evaluations_job_id", ["job_id"])
