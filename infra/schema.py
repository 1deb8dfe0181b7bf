"""The tables. Times are integer milliseconds since 1970 by the database's clock; identifiers are UUIDv7 text."""

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_json = JSON().with_variant(JSONB(), "postgresql")
# SQLite gives out row numbers only for a column that is spelt INTEGER.
_row_number = BigInteger().with_variant(Integer(), "sqlite")
_id = String(64)

_STATES = "'blocked', 'scheduled', 'queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled'"
_ACTIVE = "'blocked', 'scheduled', 'queued', 'running', 'cancelling'"
_TERMINAL = "'succeeded', 'failed', 'cancelled'"
_LEASED = "'running', 'cancelling'"

_ZERO = text("0")

DEFAULT_TENANT = "default"
DEFAULT_QUEUE = "default"

tenants = Table(
    "tenants",
    metadata,
    Column("id", _id, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # A limit that is null does not exist. max_running counts GPU slots, max_bytes the bytes of
    # artifacts not deleted and of texts.
    Column("weight", Float, nullable=False, server_default=text("1")),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    Column("max_bytes", BigInteger),
    Column("paused", Integer, nullable=False, server_default=_ZERO),
    # Start-time fair queueing: when, in GPU seconds by weight, the tenant's last claim began and its next may.
    Column("vstart", Float, nullable=False, server_default=_ZERO),
    Column("vtime", Float, nullable=False, server_default=_ZERO),
)

queues = Table(
    "queues",
    metadata,
    Column("name", _id, primary_key=True),
    Column("paused", Integer, nullable=False, server_default=_ZERO),
    Column("max_running", Integer),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("prefix", String(8), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("scopes", _json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("revoked_at", BigInteger),
    Index("ix_api_keys_tenant_id", "tenant_id"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("spec", _json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("cancelled_at", BigInteger),
    # When somebody noticed that nothing of it waits or runs any more; null again when something is retried.
    Column("finished_at", BigInteger),
    Index("ix_batches_listing", "tenant_id", "created_at", "id"),
    Index(
        "ix_batches_unfinished",
        "id",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(32)),
    Column("detail", Text),
    Column("spec", _json, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("forced", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("run_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("lease_losses", Integer, nullable=False),
    Column("max_lease_losses", Integer, nullable=False),
    Column("lease_owner", String(200)),
    Column("lease_until", BigInteger),
    Column("fence", BigInteger, nullable=False),
    Column("phase", String(64), nullable=False),
    Column("progress_done", Integer, nullable=False),
    Column("progress_total", Integer, nullable=False),
    Column("result", _json),
    Column("version", Integer, nullable=False),
    # No foreign key: SQLite cannot add a column that references another table and is not null, and ended jobs keep the
    # name of a queue that is deleted. The job store's own lock ties a job that has not ended to its queue.
    # Batches are never deleted before their jobs.
    Column("queue", _id, nullable=False, server_default=text("'default'")),
    Column("batch_id", _id),
    Column("deadline_at", BigInteger),
    Column("gpus", Integer, nullable=False, server_default=text("1")),
    Column("gpu_ms", BigInteger, nullable=False, server_default=_ZERO),
    # The order of claims within a tenant: run_at plus a span for each point of priority (infra.job_model.turn_at).
    Column("turn_at", BigInteger, nullable=False, server_default=_ZERO),
    Column("model_name", String(400), nullable=False, server_default=text("''")),
    Column("recipe_name", String(200), nullable=False, server_default=text("''")),
    Column("labels", _json),
    Column("traceparent", String(64)),
    # Whether other jobs wait for it. In its own row: whoever ends it sees what was written there a moment before, while
    # a look into job_deps from the same statement would not.
    Column("awaited", Integer, nullable=False, server_default=_ZERO),
    CheckConstraint(f"state IN ({_STATES})", name="state_known"),
    CheckConstraint(f"(finished_at IS NOT NULL) = (state IN ({_TERMINAL}))", name="finished_iff_terminal"),
    CheckConstraint(f"(lease_until IS NOT NULL) = (state IN ({_LEASED}))", name="leased_iff_held"),
    CheckConstraint("state <> 'failed' OR (reason IS NOT NULL AND detail IS NOT NULL)", name="failed_says_why"),
    CheckConstraint("state <> 'succeeded' OR result IS NOT NULL", name="succeeded_has_result"),
    # The queue's own order; partial, so that finished jobs cost a claim nothing.
    Index(
        "ix_jobs_queue",
        "tenant_id",
        "queue",
        "turn_at",
        "id",
        sqlite_where=text("state = 'queued'"),
        postgresql_where=text("state = 'queued'"),
    ),
    Index(
        "ix_jobs_scheduled",
        "run_at",
        sqlite_where=text("state = 'scheduled'"),
        postgresql_where=text("state = 'scheduled'"),
    ),
    Index(
        "ix_jobs_leases",
        "lease_until",
        sqlite_where=text("lease_until IS NOT NULL"),
        postgresql_where=text("lease_until IS NOT NULL"),
    ),
    # Two requests at the same moment for the same work make one job; `force` opts out.
    Index(
        "uq_jobs_active_fingerprint",
        "tenant_id",
        "fingerprint",
        unique=True,
        sqlite_where=text(f"forced = 0 AND state IN ({_ACTIVE})"),
        postgresql_where=text(f"forced = 0 AND state IN ({_ACTIVE})"),
    ),
    # What counts against quotas.
    Index(
        "ix_jobs_open",
        "tenant_id",
        "state",
        sqlite_where=text("finished_at IS NULL"),
        postgresql_where=text("finished_at IS NULL"),
    ),
    Index(
        "ix_jobs_deadlines",
        "deadline_at",
        sqlite_where=text("deadline_at IS NOT NULL AND finished_at IS NULL"),
        postgresql_where=text("deadline_at IS NOT NULL AND finished_at IS NULL"),
    ),
    Index(
        "ix_jobs_batch_id",
        "batch_id",
        sqlite_where=text("batch_id IS NOT NULL"),
        postgresql_where=text("batch_id IS NOT NULL"),
    ),
    Index("ix_jobs_fingerprint", "tenant_id", "fingerprint"),
    Index("ix_jobs_listing", "tenant_id", "created_at", "id"),
    Index("ix_jobs_listing_by_state", "tenant_id", "state", "created_at", "id"),
    Index("ix_jobs_listing_by_model", "tenant_id", "model_name", "created_at", "id"),
    Index("ix_jobs_listing_by_recipe", "tenant_id", "recipe_name", "created_at", "id"),
)

job_deps = Table(
    "job_deps",
    metadata,
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("depends_on", _id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Index("ix_job_deps_depends_on", "depends_on"),
)

batch_items = Table(
    "batch_items",
    metadata,
    Column("batch_id", _id, ForeignKey("batches.id", ondelete="CASCADE"), primary_key=True),
    Column("idx", Integer, primary_key=True, autoincrement=False),
    Column("model_name", String(400), nullable=False),
    Column("recipe_name", String(200), nullable=False),
    # Null for an item that made no job: then detail says why.
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="SET NULL")),
    Column("reused", Integer, nullable=False, server_default=_ZERO),
    Column("detail", Text),
    Index("ix_batch_items_job_id", "job_id"),
)

job_layers = Table(
    "job_layers",
    metadata,
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("layer", Integer, primary_key=True, autoincrement=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("key", Text),
    Column("sha256", String(64)),
    Column("size_bytes", BigInteger),
    Column("metrics", _json, nullable=False),
    Column("seconds", Float),
    Column("node", String(200)),
    Column("detail", Text),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    CheckConstraint("state IN ('pending', 'running', 'done', 'failed')", name="state_known"),
    CheckConstraint(
        "state <> 'done' OR (key IS NOT NULL AND sha256 IS NOT NULL AND size_bytes IS NOT NULL)", name="done_is_stored"
    ),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", _row_number, primary_key=True, autoincrement=True),
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("type", String(32), nullable=False),
    Column("actor", String(200), nullable=False),
    Column("data", _json, nullable=False),
    Index("ix_job_events_job_id_id", "job_id", "id"),
    # Without it SQLite may hand a deleted row's number out again, and a reader who resumes by number would miss events.
    sqlite_autoincrement=True,
)

workers = Table(
    "workers",
    metadata,
    Column("owner", String(200), primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("beat_at", BigInteger, nullable=False),
    Column("info", _json, nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", _id, ForeignKey("tenants.id"), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("route", String(200), nullable=False),
    Column("body_hash", String(64), nullable=False),
    # The answer to replay. Only the transaction that works on the request ever sees a row without.
    Column("status", Integer),
    Column("headers", _json),
    Column("body", Text),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("job_id", _id, ForeignKey("jobs.id"), nullable=False, unique=True),
    Column("fingerprint", String(64), nullable=False),
    Column("model_name", String(400), nullable=False),
    Column("recipe_name", String(200), nullable=False),
    Column("manifest_key", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("summary", _json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # Past it, the collector marks the artifact deleted.
    Column("expires_at", BigInteger),
    Column("deleted_at", BigInteger),
    # When its objects were gone from storage, too.
    Column("purged_at", BigInteger),
    CheckConstraint("purged_at IS NULL OR deleted_at IS NOT NULL", name="purged_is_deleted"),
    Index("ix_artifacts_listing", "tenant_id", "created_at", "id"),
    Index("ix_artifacts_fingerprint", "tenant_id", "fingerprint"),
    # The sum of live bytes comes from the index alone.
    Index(
        "ix_artifacts_live",
        "tenant_id",
        "size_bytes",
        sqlite_where=text("deleted_at IS NULL"),
        postgresql_where=text("deleted_at IS NULL"),
    ),
)

artifact_tags = Table(
    "artifact_tags",
    metadata,
    Column("tenant_id", _id, ForeignKey("tenants.id"), primary_key=True),
    Column("tag", String(100), primary_key=True),
    Column("artifact_id", _id, ForeignKey("artifacts.id", ondelete="CASCADE"), nullable=False),
    Index("ix_artifact_tags_artifact_id", "artifact_id"),
)

# What projects have uploaded to calibrate and measure on; the object itself is under `key`.
texts = Table(
    "texts",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("key", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_texts_listing", "tenant_id", "created_at", "id"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    # The job that measured: an evaluate job, or a quantize job with a quality gate, which may measure two things.
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("artifact_id", _id, ForeignKey("artifacts.id", ondelete="CASCADE")),
    Column("model_name", String(400), nullable=False),
    Column("metrics", _json, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    # The job that made what was measured, whether it has an artifact or not; null for an unquantized model.
    Column("artifact_job_id", _id),
    # Of what was measured and how (infra.fingerprints): a newer row with the same one replaces an older.
    Column("fingerprint", String(64), nullable=False, server_default=text("''")),
    # What was asked for; null for rows of releases that did not keep it.
    Column("settings", _json),
    # How each part of it went: {name: {"state": "done" | "failed" | "pending", "error": ...}}.
    Column("parts", _json),
    Column("is_complete", Integer, nullable=False, server_default=text("1")),
    Column("report_key", Text),
    Index("ix_evaluations_listing", "tenant_id", "created_at", "id"),
    Index("ix_evaluations_artifact_id", "artifact_id"),
    Index("ix_evaluations_artifact_job_id", "artifact_job_id"),
    Index("ix_evaluations_fingerprint", "tenant_id", "fingerprint"),
    # Also finds the evaluations of a job.
    Index("uq_evaluations_measured", "job_id", "fingerprint", unique=True),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", _id, primary_key=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("url", Text, nullable=False),
    # Never the secret itself: what it is derived from, or its ciphertext.
    Column("secret", Text, nullable=False),
    # A list of event types such as job.succeeded; an empty one means all.
    Column("events", _json, nullable=False),
    Column("enabled", Integer, nullable=False, server_default=text("1")),
    Column("failing_since", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_webhooks_tenant_id", "tenant_id"),
)

# The outbox: rows are inserted in the transaction of the job's transition and sent by whoever claims them.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", _id, primary_key=True),
    Column("webhook_id", _id, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", _id, ForeignKey("jobs.id", ondelete="SET NULL")),
    Column("event", String(64), nullable=False),
    Column("payload", _json, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("next_at", BigInteger, nullable=False),
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="state_known"),
    Index("ix_webhook_deliveries_listing", "webhook_id", "created_at", "id"),
    Index("ix_webhook_deliveries_job_id", "job_id"),
    Index(
        "ix_webhook_deliveries_due",
        "next_at",
        sqlite_where=text("state = 'pending'"),
        postgresql_where=text("state = 'pending'"),
    ),
)

# Append-only, for bills: a row outlives its job, so it does not reference it.
usage_ledger = Table(
    "usage_ledger",
    metadata,
    Column("id", _row_number, primary_key=True, autoincrement=True),
    Column("tenant_id", _id, ForeignKey("tenants.id"), nullable=False),
    Column("job_id", _id, nullable=False),
    Column("layer", Integer, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("gpu_ms", BigInteger, nullable=False),
    Column("device", String(64), nullable=False),
    Column("at", BigInteger, nullable=False),
    # A layer that is reported twice is paid once.
    UniqueConstraint("job_id", "layer", "fence"),
    Index("ix_usage_ledger_tenant_id_at", "tenant_id", "at"),
    sqlite_autoincrement=True,
)

# Who changed keys, queues, tenants, webhooks and artifacts; jobs have job_events. A null tenant means the whole server.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", _row_number, primary_key=True, autoincrement=True),
    Column("tenant_id", _id, ForeignKey("tenants.id")),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("target", String(200), nullable=False),
    Column("data", _json, nullable=False),
    Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
    sqlite_autoincrement=True,
)

# Written to see whether the database can be written.
probes = Table("probes", metadata, Column("name", _id, primary_key=True), Column("at", BigInteger, nullable=False))
