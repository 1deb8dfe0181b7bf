"""The service: quotas, queues, batches, artifacts, evaluations, webhooks, usage, audit; jobs learn what these need.

Revision ID: 0002
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from infra.ids import new_id

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(), "postgresql")
_ROW_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_ID = sa.String(64)
_ZERO = sa.text("0")
_MS_PER_PRIORITY = 60_000
_BATCH = 500


def upgrade() -> None:
    """Make the tables, then fill what existing rows lack."""
    _tenants_and_queues()
    _batches()
    _jobs()
    _job_indexes()
    _children_of_jobs()
    _artifacts()
    _webhooks()
    _records()
    _fill_jobs()
    _fill_artifacts()


def downgrade() -> None:
    """Drop what the upgrade made."""
    for table in (
        "audit_log",
        "usage_ledger",
        "webhook_deliveries",
        "webhooks",
        "evaluations",
        "artifact_tags",
        "artifacts",
        "idempotency_keys",
        "batch_items",
        "job_deps",
        "batches",
        "queues",
    ):
        op.drop_table(table)
    for index in (
        "ix_jobs_queue",
        "ix_jobs_open",
        "ix_jobs_deadlines",
        "ix_jobs_batch_id",
        "ix_jobs_listing_by_state",
        "ix_jobs_listing_by_model",
    ):
        op.drop_index(index, "jobs")
    for column in _JOB_COLUMNS():
        op.drop_column("jobs", column.name)
    op.create_index("ix_jobs_queue", "jobs", ["priority", "run_at", "id"], **_partial("state = 'queued'"))
    for column in _TENANT_COLUMNS():
        op.drop_column("tenants", column.name)


def _partial(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _foreign_key(table: str, column: str, target: str, ondelete: str | None = None) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint([column], [f"{target}.id"], name=f"fk_{table}_{column}", ondelete=ondelete)


def _TENANT_COLUMNS() -> Sequence[sa.Column[Any]]:  # noqa: N802  a constant; columns cannot be used twice
    return (
        sa.Column("weight", sa.Float(), nullable=False, server_default=sa.text("1")),
        sa.Column("max_queued", sa.Integer()),
        sa.Column("max_running", sa.Integer()),
        sa.Column("max_bytes", sa.BigInteger()),
        sa.Column("paused", sa.Integer(), nullable=False, server_default=_ZERO),
        sa.Column("vstart", sa.Float(), nullable=False, server_default=_ZERO),
        sa.Column("vtime", sa.Float(), nullable=False, server_default=_ZERO),
    )


def _JOB_COLUMNS() -> Sequence[sa.Column[Any]]:  # noqa: N802  as above
    return (
        sa.Column("queue", _ID, nullable=False, server_default=sa.text("'default'")),
        sa.Column("batch_id", _ID),
        sa.Column("deadline_at", sa.BigInteger()),
        sa.Column("gpus", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("gpu_ms", sa.BigInteger(), nullable=False, server_default=_ZERO),
        sa.Column("turn_at", sa.BigInteger(), nullable=False, server_default=_ZERO),
        sa.Column("model_name", sa.String(400), nullable=False, server_default=sa.text("''")),
        sa.Column("recipe_name", sa.String(200), nullable=False, server_default=sa.text("''")),
        sa.Column("labels", _JSON),
        sa.Column("traceparent", sa.String(64)),
    )


def _tenants_and_queues() -> None:
    for column in _TENANT_COLUMNS():
        op.add_column("tenants", column)
    queues = op.create_table(
        "queues",
        sa.Column("name", _ID, nullable=False),
        sa.Column("paused", sa.Integer(), nullable=False, server_default=_ZERO),
        sa.Column("max_running", sa.Integer()),
        sa.PrimaryKeyConstraint("name", name="pk_queues"),
    )
    op.bulk_insert(queues, [{"name": "default"}])


def _batches() -> None:
    op.create_table(
        "batches",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("spec", _JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("cancelled_at", sa.BigInteger()),
        _foreign_key("batches", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_listing", "batches", ["tenant_id", "created_at", "id"])


def _jobs() -> None:
    for column in _JOB_COLUMNS():
        op.add_column("jobs", column)


def _job_indexes() -> None:
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["tenant_id", "queue", "turn_at", "id"], **_partial("state = 'queued'"))
    op.create_index("ix_jobs_open", "jobs", ["tenant_id", "state"], **_partial("finished_at IS NULL"))
    is_open_with_deadline = "deadline_at IS NOT NULL AND finished_at IS NULL"
    op.create_index("ix_jobs_deadlines", "jobs", ["deadline_at"], **_partial(is_open_with_deadline))
    op.create_index("ix_jobs_batch_id", "jobs", ["batch_id"], **_partial("batch_id IS NOT NULL"))
    op.create_index("ix_jobs_listing_by_state", "jobs", ["tenant_id", "state", "created_at", "id"])
    op.create_index("ix_jobs_listing_by_model", "jobs", ["tenant_id", "model_name", "created_at", "id"])


def _children_of_jobs() -> None:
    op.create_table(
        "job_deps",
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("depends_on", _ID, nullable=False),
        _foreign_key("job_deps", "job_id", "jobs", "CASCADE"),
        _foreign_key("job_deps", "depends_on", "jobs", "CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "depends_on", name="pk_job_deps"),
    )
    op.create_index("ix_job_deps_depends_on", "job_deps", ["depends_on"])
    op.create_table(
        "batch_items",
        sa.Column("batch_id", _ID, nullable=False),
        sa.Column("idx", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("model_name", sa.String(400), nullable=False),
        sa.Column("recipe_name", sa.String(200), nullable=False),
        sa.Column("job_id", _ID),
        sa.Column("reused", sa.Integer(), nullable=False, server_default=_ZERO),
        sa.Column("detail", sa.Text()),
        _foreign_key("batch_items", "batch_id", "batches", "CASCADE"),
        _foreign_key("batch_items", "job_id", "jobs", "SET NULL"),
        sa.PrimaryKeyConstraint("batch_id", "idx", name="pk_batch_items"),
    )
    op.create_index("ix_batch_items_job_id", "batch_items", ["job_id"])
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("route", sa.String(200), nullable=False),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("status", sa.Integer()),
        sa.Column("headers", _JSON),
        sa.Column("body", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("state IN ('running', 'done')", name=op.f("ck_idempotency_keys_state_known")),
        sa.CheckConstraint("state <> 'done' OR status IS NOT NULL", name=op.f("ck_idempotency_keys_done_has_answer")),
        _foreign_key("idempotency_keys", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("tenant_id", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def _artifacts() -> None:
    op.create_table(
        "artifacts",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("model_name", sa.String(400), nullable=False),
        sa.Column("recipe_name", sa.String(200), nullable=False),
        sa.Column("manifest_key", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("summary", _JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger()),
        sa.Column("deleted_at", sa.BigInteger()),
        sa.Column("purged_at", sa.BigInteger()),
        sa.CheckConstraint("purged_at IS NULL OR deleted_at IS NOT NULL", name=op.f("ck_artifacts_purged_is_deleted")),
        _foreign_key("artifacts", "tenant_id", "tenants"),
        _foreign_key("artifacts", "job_id", "jobs"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("job_id", name="uq_artifacts_job_id"),
    )
    op.create_index("ix_artifacts_listing", "artifacts", ["tenant_id", "created_at", "id"])
    op.create_index("ix_artifacts_fingerprint", "artifacts", ["tenant_id", "fingerprint"])
    op.create_index("ix_artifacts_live", "artifacts", ["tenant_id", "size_bytes"], **_partial("deleted_at IS NULL"))
    op.create_table(
        "artifact_tags",
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("tag", sa.String(100), nullable=False),
        sa.Column("artifact_id", _ID, nullable=False),
        _foreign_key("artifact_tags", "tenant_id", "tenants"),
        _foreign_key("artifact_tags", "artifact_id", "artifacts", "CASCADE"),
        sa.PrimaryKeyConstraint("tenant_id", "tag", name="pk_artifact_tags"),
    )
    op.create_index("ix_artifact_tags_artifact_id", "artifact_tags", ["artifact_id"])
    op.create_table(
        "evaluations",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("artifact_id", _ID),
        sa.Column("model_name", sa.String(400), nullable=False),
        sa.Column("metrics", _JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        _foreign_key("evaluations", "tenant_id", "tenants"),
        _foreign_key("evaluations", "job_id", "jobs", "CASCADE"),
        _foreign_key("evaluations", "artifact_id", "artifacts", "CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_evaluations"),
        sa.UniqueConstraint("job_id", name="uq_evaluations_job_id"),
    )
    op.create_index("ix_evaluations_listing", "evaluations", ["tenant_id", "created_at", "id"])
    op.create_index("ix_evaluations_artifact_id", "evaluations", ["artifact_id"])


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", _ID, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("events", _JSON, nullable=False),
        sa.Column("enabled", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("failing_since", sa.BigInteger()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        _foreign_key("webhooks", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_webhooks"),
    )
    op.create_index("ix_webhooks_tenant_id", "webhooks", ["tenant_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", _ID, nullable=False),
        sa.Column("webhook_id", _ID, nullable=False),
        sa.Column("job_id", _ID),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("payload", _JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.BigInteger(), nullable=False),
        sa.Column("last_status", sa.Integer()),
        sa.Column("last_error", sa.Text()),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger()),
        sa.CheckConstraint(
            "state IN ('pending', 'delivered', 'failed')", name=op.f("ck_webhook_deliveries_state_known")
        ),
        _foreign_key("webhook_deliveries", "webhook_id", "webhooks", "CASCADE"),
        _foreign_key("webhook_deliveries", "job_id", "jobs", "SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_webhook_deliveries"),
    )
    op.create_index("ix_webhook_deliveries_listing", "webhook_deliveries", ["webhook_id", "created_at", "id"])
    op.create_index("ix_webhook_deliveries_job_id", "webhook_deliveries", ["job_id"])
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["next_at"], **_partial("state = 'pending'"))


def _records() -> None:
    op.create_table(
        "usage_ledger",
        sa.Column("id", _ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("tenant_id", _ID, nullable=False),
        sa.Column("job_id", _ID, nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("gpu_ms", sa.BigInteger(), nullable=False),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        _foreign_key("usage_ledger", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_usage_ledger"),
        sa.UniqueConstraint("job_id", "layer", "fence", name="uq_usage_ledger_job_id_layer_fence"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_usage_ledger_tenant_id_at", "usage_ledger", ["tenant_id", "at"])
    op.create_table(
        "audit_log",
        sa.Column("id", _ROW_NUMBER, autoincrement=True, nullable=False),
        sa.Column("tenant_id", _ID),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("data", _JSON, nullable=False),
        _foreign_key("audit_log", "tenant_id", "tenants"),
        sa.PrimaryKeyConstraint("id", name="pk_audit_log"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_log_tenant_id_id", "audit_log", ["tenant_id", "id"])


def _fill_jobs() -> None:
    """Give existing jobs their names and their place in the new order."""
    if op.get_bind().dialect.name == "postgresql":
        model, recipe = "spec -> 'model' ->> 'name'", "spec -> 'recipe' ->> 'name'"
    else:
        model, recipe = "json_extract(spec, '$.model.name')", "json_extract(spec, '$.recipe.name')"
    op.execute(
        f"UPDATE jobs SET turn_at = run_at + priority * {_MS_PER_PRIORITY}, "  # noqa: S608  constants only
        f"model_name = coalesce({model}, ''), recipe_name = coalesce({recipe}, '')"
    )


def _fill_artifacts() -> None:
    """Give every artifact that existing jobs have made its row."""
    jobs = sa.table(
        "jobs",
        *(sa.column(name) for name in ("id", "tenant_id", "fingerprint", "model_name", "recipe_name", "finished_at")),
        sa.column("state"),
        sa.column("kind"),
        sa.column("result", _JSON),
    )
    artifacts = sa.table(
        "artifacts",
        *(sa.column(name) for name in ("id", "tenant_id", "job_id", "fingerprint", "model_name", "recipe_name")),
        *(sa.column(name) for name in ("manifest_key", "size_bytes", "created_at")),
        sa.column("summary", _JSON),
    )
    made = sa.select(jobs).where(jobs.c.state == "succeeded", jobs.c.kind == "quantize").order_by(jobs.c.id)
    after = ""
    while rows := op.get_bind().execute(made.where(jobs.c.id > after).limit(_BATCH)).mappings().all():
        after = rows[-1]["id"]
        found = [(row, row["result"].get("artifact")) for row in rows]
        values = [
            {
                "id": new_id("art"),
                "tenant_id": row["tenant_id"],
                "job_id": row["id"],
                "fingerprint": row["fingerprint"],
                "model_name": row["model_name"],
                "recipe_name": row["recipe_name"],
                "manifest_key": artifact["manifest_key"],
                "size_bytes": artifact["size_bytes"],
                "summary": artifact["summary"],
                "created_at": row["finished_at"],
            }
            for row, artifact in found
            if isinstance(artifact, dict) and "manifest_key" in artifact
        ]
        if values:
            op.bulk_insert(artifacts, values)
