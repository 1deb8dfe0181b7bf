"""Tenants, which people know as projects, and the audit log."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.audit import AuditEntry
from infra.tenants import Tenant
from service.schemas.common import check_text, moment, with_moments

_BIGGEST_COUNT = 2**31 - 1
_BIGGEST = 2**53 - 1  # what every JSON parser reads exactly


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class TenantChange(BaseModel):
    """What to change of a project; fields that are left out stay as they are."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, json_schema_extra=_without_defaults)

    name: str = Field(default="", min_length=1, max_length=200)
    """What people call it."""
    weight: float = Field(default=1.0, gt=0, le=1000, strict=True)
    """Its share of the workers while others wait, too: 2 gets twice what 1 gets."""
    max_queued: int | None = Field(default=None, ge=0, le=_BIGGEST_COUNT, strict=True)
    """Jobs that may wait; null is no limit."""
    max_running: int | None = Field(default=None, ge=0, le=_BIGGEST_COUNT, strict=True)
    """GPU slots that may run at once; null is no limit."""
    max_bytes: int | None = Field(default=None, ge=0, le=_BIGGEST, strict=True)
    """Bytes of artifacts that are not deleted, and of texts; null is no limit."""
    paused: bool = Field(default=False, strict=True)
    """Whether its jobs wait whatever is free."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value

    def changes(self) -> dict[str, Any]:
        """Return the fields that were sent."""
        return {name: getattr(self, name) for name in TenantChange.model_fields if name in self.model_fields_set}


class TenantRequest(TenantChange):
    """The project to make."""

    model_config = ConfigDict(json_schema_extra=None)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", examples=["zoo"])
    """Part of every key in the object store, so it never changes."""
    name: str = Field(min_length=1, max_length=200, examples=["Model zoo"])
    """What people call it."""


class TenantView(BaseModel):
    """A project and its limits."""

    id: str
    name: str
    created_at: datetime
    weight: float
    max_queued: int | None
    max_running: int | None
    max_bytes: int | None
    paused: bool


class TenantPage(BaseModel):
    """A page of projects, newest first."""

    items: list[TenantView]
    next_cursor: str | None


class AuditView(BaseModel):
    """One change that somebody made to keys, queues, projects, webhooks, artifacts or texts."""

    id: int
    at: datetime
    actor: str
    action: str
    target: str
    data: dict[str, Any]


class AuditPage(BaseModel):
    """A page of the audit log, newest first."""

    items: list[AuditView]
    next_cursor: str | None


def tenant_view(tenant: Tenant) -> TenantView:
    """Show a project."""
    return TenantView(
        id=tenant.id,
        name=tenant.name,
        created_at=moment(tenant.created_at),
        weight=tenant.weight,
        max_queued=tenant.max_queued,
        max_running=tenant.max_running,
        max_bytes=tenant.max_bytes,
        paused=tenant.paused,
    )


def audit_view(entry: AuditEntry) -> AuditView:
    """Show an entry of the audit log."""
    return AuditView(
        id=entry.id,
        at=moment(entry.at),
        actor=entry.actor,
        action=entry.action,
        target=entry.target,
        data=with_moments(entry.data),
    )
