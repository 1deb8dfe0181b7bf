"""What a tenant may have: waiting jobs, running GPU slots, stored bytes. Counted from the rows, never cached."""

from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, bindparam, func, select

from infra.database import take_turns
from infra.errors import QuotaExceeded, TenantNotFound
from infra.job_model import HELD, WAITING, JobState
from infra.job_rows import state_is
from infra.prepared import Prepared
from infra.schema import artifacts, jobs, tenants, texts

_LIMITS = Prepared(
    select(tenants.c.max_queued, tenants.c.max_running, tenants.c.max_bytes).where(
        tenants.c.id == bindparam("of_tenant")
    )
)


@dataclass(frozen=True, slots=True)
class Allowance:
    """A tenant's limits; none means no limit."""

    max_queued: int | None
    max_running: int | None
    max_bytes: int | None


@dataclass(frozen=True, slots=True)
class Holding:
    """What a tenant has now of what its limits are about."""

    queued: int
    running: int
    size_bytes: int


def allowance(connection: Connection, tenant_id: str) -> Allowance:
    """Return a tenant's limits. Where there are any, requests take turns, so that no two of them take the last.

    Not by a lock on the tenant's row: claims and finished layers move its virtual time on, and would wait for a batch
    while they hold jobs that the batch may come to.

    Raises:
        TenantNotFound: no such tenant.
    """
    row = _LIMITS.row(connection, {"of_tenant": tenant_id})
    if row is None:
        raise TenantNotFound(f"no project {tenant_id}", tenant_id=tenant_id)
    if row["max_queued"] is not None or row["max_bytes"] is not None:
        take_turns(connection, f"quota of {tenant_id}")
    return Allowance(**row)


def require_room(connection: Connection, tenant_id: str, *, gpus: int, more: int = 1) -> None:
    """Raise unless the tenant may queue so many more jobs of this size.

    Raises:
        TenantNotFound: no such tenant.
        QuotaExceeded: it may not, now or (max_running) ever.
    """
    limits = allowance(connection, tenant_id)
    if limits.max_running is not None and gpus > limits.max_running:
        words = f"GPU slots at once; this job alone needs {gpus}"
        raise _exceeded("max_running", limits.max_running, gpus, words, is_final=True)
    if limits.max_queued is not None:
        waiting = connection.execute(select(_count(tenant_id, *WAITING))).scalar_one()
        if waiting + more > limits.max_queued:
            words = f"waiting jobs, has {waiting}, and this would add {more}"
            raise _exceeded("max_queued", limits.max_queued, waiting, words, is_final=more > limits.max_queued)
    _require_bytes(connection, tenant_id, limits, 1)


def require_bytes(connection: Connection, tenant_id: str, size: int) -> None:
    """Raise unless the tenant may store so many more bytes.

    Raises:
        TenantNotFound: no such tenant.
        QuotaExceeded: it may not.
    """
    _require_bytes(connection, tenant_id, allowance(connection, tenant_id), size)


def _require_bytes(connection: Connection, tenant_id: str, limits: Allowance, more: int) -> None:
    if limits.max_bytes is not None:
        used = connection.execute(select(_live_bytes(tenant_id))).scalar_one()
        if used + more > limits.max_bytes:
            words = f"bytes of artifacts and texts and has {used}"
            raise _exceeded("max_bytes", limits.max_bytes, used, words, is_final=more > limits.max_bytes)


def holding(connection: Connection, tenant_id: str) -> Holding:
    """Return what a tenant has now."""
    query = select(_count(tenant_id, *WAITING), _running_gpus(tenant_id), _live_bytes(tenant_id))
    return Holding(*connection.execute(query).one())


def _exceeded(quota: str, limit: int, used: int, words: str, *, is_final: bool = False) -> QuotaExceeded:
    message = f"this project may have {limit} {words}"
    return QuotaExceeded(message, quota=quota, limit=limit, used=used, is_final=is_final)


def _count(tenant_id: str, *states: JobState) -> ColumnElement[int]:
    # finished_at says the same as the states, and is what the partial index is about.
    return (
        select(func.count())
        .where(jobs.c.tenant_id == tenant_id, jobs.c.finished_at.is_(None), state_is(*states))
        .scalar_subquery()
    )


def _running_gpus(tenant_id: str) -> ColumnElement[int]:
    return (
        select(func.coalesce(func.sum(jobs.c.gpus), 0))
        .where(jobs.c.tenant_id == tenant_id, jobs.c.finished_at.is_(None), state_is(*HELD))
        .scalar_subquery()
    )


def _live_bytes(tenant_id: str) -> ColumnElement[int]:
    of_artifacts = select(func.coalesce(func.sum(artifacts.c.size_bytes), 0)).where(
        artifacts.c.tenant_id == tenant_id, artifacts.c.deleted_at.is_(None)
    )
    of_texts = select(func.coalesce(func.sum(texts.c.size_bytes), 0)).where(texts.c.tenant_id == tenant_id)
    return of_artifacts.scalar_subquery() + of_texts.scalar_subquery()
