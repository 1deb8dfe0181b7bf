"""Tenants, which people know as projects: who jobs, keys and artifacts belong to, and what each may use."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Engine, insert, select, tuple_, update
from sqlalchemy.engine import RowMapping
from sqlalchemy.exc import IntegrityError

from infra import audit
from infra.database import now_ms, read, write
from infra.errors import TenantExists, TenantNotFound
from infra.schema import tenants


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and its limits; a limit that is none does not exist."""

    id: str
    name: str
    created_at: int
    weight: float
    """Its share of the workers while others wait, too: 2 gets twice what 1 gets."""
    max_queued: int | None
    """Jobs that may wait: blocked, scheduled or queued."""
    max_running: int | None
    """GPU slots that may run at once."""
    max_bytes: int | None
    """Bytes of artifacts that are not deleted, and of texts."""
    paused: bool
    """Whether its jobs wait whatever is free."""


CHANGEABLE = frozenset({"name", "weight", "max_queued", "max_running", "max_bytes", "paused"})


class TenantStore:
    """Makes, reads and changes tenants. A tenant is never deleted: its bills and its audit log remain."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def create(self, tenant_id: str, *, actor: str, **values: Any) -> Tenant:
        """Make a tenant; `values` are the fields of CHANGEABLE, and the name is among them.

        Raises:
            TenantExists: the id is taken.
        """
        row = {"id": tenant_id, "created_at": now_ms(self._engine.dialect), **_columns(values)}
        try:
            with write(self._engine) as connection:
                tenant = _from_row(connection.execute(insert(tenants).values(row).returning(tenants)).mappings().one())
                audit.record(
                    connection, tenant_id=tenant_id, actor=actor, action="tenant.created", target=tenant_id, data=values
                )
                return tenant
        except IntegrityError as error:
            raise TenantExists(f"there is a project {tenant_id} already", tenant_id=tenant_id) from error

    def get(self, tenant_id: str) -> Tenant:
        """Return one tenant.

        Raises:
            TenantNotFound: no such tenant.
        """
        with read(self._engine) as connection:
            row = connection.execute(select(tenants).where(tenants.c.id == tenant_id)).mappings().first()
        if row is None:
            raise TenantNotFound(f"no project {tenant_id}", tenant_id=tenant_id)
        return _from_row(row)

    def page(self, *, limit: int, before: tuple[int, str] | None = None) -> Sequence[Tenant]:
        """Return tenants, newest first; `before` is (created_at, id) of the last one on the page before."""
        query = select(tenants).order_by(tenants.c.created_at.desc(), tenants.c.id.desc()).limit(limit)
        if before is not None:
            query = query.where(tuple_(tenants.c.created_at, tenants.c.id) < tuple_(*before))
        with read(self._engine) as connection:
            return [_from_row(row) for row in connection.execute(query).mappings()]

    def change(self, tenant_id: str, *, actor: str, **values: Any) -> Tenant:
        """Change some of a tenant's fields. What is waiting or running already is left alone.

        Raises:
            TenantNotFound: no such tenant.
        """
        if not values:
            return self.get(tenant_id)
        statement = update(tenants).where(tenants.c.id == tenant_id).values(_columns(values)).returning(tenants)
        with write(self._engine) as connection:
            row = connection.execute(statement).mappings().first()
            if row is None:
                raise TenantNotFound(f"no project {tenant_id}", tenant_id=tenant_id)
            audit.record(
                connection, tenant_id=tenant_id, actor=actor, action="tenant.changed", target=tenant_id, data=values
            )
        return _from_row(row)


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    assert values.keys() <= CHANGEABLE, values
    return {**values, **({"paused": int(values["paused"])} if "paused" in values else {})}


def _from_row(row: RowMapping) -> Tenant:
    values = {item.name: row[item.name] for item in fields(Tenant)}
    return Tenant(**{**values, "paused": bool(row["paused"])})
