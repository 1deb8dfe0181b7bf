"""Answers by Idempotency-Key have no state any more: they are made in the transaction that does the work.

Revision ID: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_CHECKS = {
    "state_known": "state IN ('running', 'done')",
    "done_has_answer": "state <> 'done' OR status IS NOT NULL",
}


def upgrade() -> None:
    """Forget the requests that nobody works on any more: this runs before any server of this version."""
    op.execute("DELETE FROM idempotency_keys WHERE state = 'running'")
    with op.batch_alter_table("idempotency_keys") as table:
        for name in _CHECKS:
            table.drop_constraint(op.f(f"ck_idempotency_keys_{name}"), type_="check")
        table.drop_column("state")


def downgrade() -> None:
    """Give the answers their state back."""
    with op.batch_alter_table("idempotency_keys") as table:
        table.add_column(sa.Column("state", sa.String(16), nullable=False, server_default="done"))
        for name, condition in _CHECKS.items():
            table.create_check_constraint(op.f(f"ck_idempotency_keys_{name}"), condition)
    with op.batch_alter_table("idempotency_keys") as table:
        table.alter_column("state", server_default=None)
