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

DEFAULT_TENANT = "default"

tenants = Table(
    "tenants",
    metadata,
    Column("id", _id, primary_key=True),
    Column("name", String(200), nullable=False),
    Column("created_at", BigInteger, nullable=False),
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
    CheckConstraint(f"state IN ({_STATES})", name="state_known"),
    CheckConstraint(f"(finished_at IS NOT NULL) = (state IN ({_TERMINAL}))", name="finished_iff_terminal"),
    CheckConstraint(f"(lease_until IS NOT NULL) = (state IN ({_LEASED}))", name="leased_iff_held"),
    CheckConstraint("state <> 'failed' OR (reason IS NOT NULL AND detail IS NOT NULL)", name="failed_says_why"),
    CheckConstraint("state <> 'succeeded' OR result IS NOT NULL", name="succeeded_has_result"),
    # The queue's own order; partial, so that finished jobs cost a claim nothing.
    Index(
        "ix_jobs_queue",
        "priority",
        "run_at",
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
    Index("ix_jobs_fingerprint", "tenant_id", "fingerprint"),
    Index("ix_jobs_listing", "tenant_id", "created_at", "id"),
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
