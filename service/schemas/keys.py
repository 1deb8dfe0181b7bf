"""API keys."""

import time
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from infra.keys import ApiKey
from service.auth import Scope, is_live
from service.schemas.common import Moment, check_text, moment


def _in_future(value: datetime) -> datetime:
    if value.timestamp() <= time.time():
        raise ValueError("a key must expire in the future")
    return value


class KeyRequest(BaseModel):
    """The key to make."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    name: str = Field(min_length=1, max_length=100, examples=["ci"])
    """What people call it."""
    scopes: list[Scope] = Field(min_length=1, max_length=20)
    """What it allows; no more than the key that makes it."""
    expires_at: Annotated[Moment, AfterValidator(_in_future)] | None = None
    """When it stops working; null is never."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class KeyRotation(BaseModel):
    """How a key is replaced."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    overlap_seconds: int = Field(default=86_400, ge=0, le=30 * 86_400, strict=True)
    """How long the old key goes on working beside the new one."""


class KeyView(BaseModel):
    """An API key without its secret."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    name: str
    prefix: str
    """The first characters of the token behind `dq_live_`, by which a person recognises it."""
    scopes: list[str]
    state: str
    """active, expired or revoked."""
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    """To the minute."""
    revoked_at: datetime | None


class KeyMade(KeyView):
    """A key that was just made."""

    token: str | None
    """The key itself, shown this once; null when the answer is a replay of an earlier one."""


class KeyPage(BaseModel):
    """A page of keys, newest first."""

    items: list[KeyView]
    next_cursor: str | None


def key_view(key: ApiKey) -> KeyView:
    """Show a key."""
    state = "revoked" if key.revoked_at is not None else "active" if is_live(key) else "expired"
    return KeyView(
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        scopes=sorted(key.scopes),
        state=state,
        created_at=moment(key.created_at),
        expires_at=moment(key.expires_at),
        last_used_at=moment(key.last_used_at),
        revoked_at=moment(key.revoked_at),
    )


def key_made(key: ApiKey, token: str | None) -> KeyMade:
    """Show a key with its token."""
    return KeyMade(**key_view(key).model_dump(), token=token)
