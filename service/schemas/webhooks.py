"""Webhooks and the log of their deliveries."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from infra.webhooks.store import Delivery, Webhook
from service.schemas.common import check_text, moment

Event = Literal["job.started", "job.succeeded", "job.failed", "job.cancelled", "batch.finished"]

_EVENTS = "Event types to hear of; an empty list is all, also those of later versions"


class WebhookRequest(BaseModel):
    """The webhook to make."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str = Field(min_length=1, max_length=1000, examples=["https://example.com/hooks/duquant"])
    """An https URL of a public server."""
    events: list[Event] = Field(default_factory=list, max_length=20, description=_EVENTS)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class WebhookChange(BaseModel):
    """What to change of a webhook; fields that are left out or null stay as they are."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = Field(default=None, min_length=1, max_length=1000)
    """An https URL of a public server."""
    events: list[Event] | None = Field(default=None, max_length=20, description=_EVENTS)
    enabled: bool | None = Field(default=None, strict=True)
    """false gives up the messages that wait; true also forgives earlier failures."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unstorable(cls, value: object) -> object:
        check_text(value)
        return value


class WebhookView(BaseModel):
    """A webhook."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    url: str
    events: list[str]
    enabled: bool
    """Also false when it was switched off because it only failed for days, or answered 410."""
    failing_since: datetime | None
    created_at: datetime


class WebhookMade(WebhookView):
    """A webhook with its secret."""

    secret: str | None
    """What messages are signed with, shown this once; null when the answer is a replay of an earlier one."""


class WebhookPage(BaseModel):
    """A page of webhooks, newest first."""

    items: list[WebhookView]
    next_cursor: str | None


class DeliveryView(BaseModel):
    """One message to a webhook, and how its delivery went."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    """Also the message's `webhook-id` header."""
    event: str
    job_id: str | None
    state: str
    """pending, delivered or failed."""
    attempts: int
    """Attempts that were begun."""
    next_at: datetime | None
    """When the next attempt is due."""
    last_status: int | None
    """What the receiver answered last."""
    last_error: str | None
    created_at: datetime
    finished_at: datetime | None


class DeliveryPage(BaseModel):
    """A page of deliveries, newest first."""

    items: list[DeliveryView]
    next_cursor: str | None


def webhook_view(webhook: Webhook) -> WebhookView:
    """Show a webhook."""
    return WebhookView(**_facts(webhook))


def webhook_made(webhook: Webhook, secret: SecretStr | None) -> WebhookMade:
    """Show a webhook with its secret."""
    return WebhookMade(**_facts(webhook), secret=None if secret is None else secret.get_secret_value())


def _facts(webhook: Webhook) -> dict[str, Any]:
    return {
        "id": webhook.id,
        "url": webhook.url,
        "events": webhook.events,
        "enabled": webhook.enabled,
        "failing_since": moment(webhook.failing_since),
        "created_at": moment(webhook.created_at),
    }


def delivery_view(delivery: Delivery) -> DeliveryView:
    """Show a delivery."""
    return DeliveryView(
        id=delivery.id,
        event=delivery.event,
        job_id=delivery.job_id,
        state=delivery.state,
        attempts=delivery.attempt,
        next_at=moment(delivery.next_at) if delivery.state == "pending" else None,
        last_status=delivery.last_status,
        last_error=delivery.last_error,
        created_at=moment(delivery.created_at),
        finished_at=moment(delivery.finished_at),
    )
