"""The audit log: who changed keys, queues, tenants, webhooks and artifacts. Jobs have their own events."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Engine, false, insert, or_, select

from infra.database import now_ms, read
from infra.schema import audit_log


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditEntry:
    """One change that somebody made."""

    id: int
    tenant_id: str | None
    """Whose thing was changed; none for what belongs to the whole server."""
    at: int
    actor: str
    action: str
    """What was done, such as `key.revoked`."""
    target: str
    """The id of what was changed."""
    data: dict[str, Any]


def record(
    connection: Connection,
    *,
    tenant_id: str | None,
    actor: str,
    action: str,
    target: str,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Note a change, in the transaction that makes it. `data` must hold no secret."""
    connection.execute(
        insert(audit_log).values(
            tenant_id=tenant_id,
            at=now_ms(connection.dialect),
            actor=actor,
            action=action,
            target=target,
            data=dict(data or {}),
        )
    )


def entries(
    engine: Engine,
    *,
    tenant_id: str | None = None,
    with_server: bool = False,
    before: int | None = None,
    limit: int = 50,
) -> list[AuditEntry]:
    """Return a tenant's entries, or everybody's, newest first.

    Args:
        engine: The database.
        tenant_id: Whose entries; none is everybody's.
        with_server: Beside a tenant's own, those of what belongs to the whole server.
        before: The id that the page before ended with.
        limit: How many at most.
    """
    query = select(audit_log).order_by(audit_log.c.id.desc()).limit(limit)
    if tenant_id is not None:
        is_servers = audit_log.c.tenant_id.is_(None) if with_server else false()
        query = query.where(or_(audit_log.c.tenant_id == tenant_id, is_servers))
    if before is not None:
        query = query.where(audit_log.c.id < before)
    with read(engine) as connection:
        rows = connection.execute(query).mappings().all()
    return [AuditEntry(**{item.name: row[item.name] for item in fields(AuditEntry)}) for row in rows]
