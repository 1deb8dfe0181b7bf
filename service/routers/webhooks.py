"""/v1/webhooks: who is told when a job starts and ends, and whether they heard."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from service import idempotency
from service.api_route import ApiRoute
from service.auth import WebhookWriter
from service.bodies import BODY_PROBLEMS, JSON_BODY
from service.context import Service
from service.errors import COMMON, responses
from service.idempotency import Made, Once
from service.openapi import shows, takes
from service.paging import Cursor, Limit, cut, read_cursor
from service.schemas.webhooks import (
    DeliveryPage,
    DeliveryView,
    WebhookChange,
    WebhookMade,
    WebhookPage,
    WebhookRequest,
    WebhookView,
    delivery_view,
    webhook_made,
    webhook_view,
)

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=ApiRoute)

WebhookId = Annotated[str, Path(examples=["wh_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]
DeliveryId = Annotated[str, Path(examples=["msg_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b"])]

_ONE = (*COMMON, "webhook-not-found")
_WEBHOOK = {
    "id": "wh_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "url": "https://example.com/hooks/duquant",
    "events": ["job.succeeded", "job.failed"],
    "enabled": True,
    "failing_since": None,
    "created_at": "2026-01-05T09:30:00.000Z",
}
_MADE = {**_WEBHOOK, "secret": "whsec_..."}
_DELIVERY = {
    "id": "msg_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "event": "job.succeeded",
    "job_id": "job_0199a1b2c3d47e5f8a9b0c1d2e3f4a5b",
    "state": "pending",
    "attempts": 1,
    "next_at": "2026-01-05T09:31:05.000Z",
    "last_status": 500,
    "last_error": "answered 500",
    "created_at": "2026-01-05T09:31:00.000Z",
    "finished_at": None,
}


@router.post(
    "/webhooks",
    operation_id="createWebhook",
    summary="Make a webhook",
    status_code=201,
    response_model=WebhookMade,
    dependencies=[JSON_BODY],
    responses={
        201: shows(_MADE, "The webhook was made; its secret is shown this once", headers=idempotency.HEADERS),
        **responses(*COMMON, *BODY_PROBLEMS, "webhook-forbidden", "quota-exceeded", *idempotency.PROBLEMS),
    },
    openapi_extra=takes(ends={"url": "https://example.com/hooks/duquant", "events": ["job.succeeded", "job.failed"]}),
)
def create_webhook(service: Service, caller: WebhookWriter, body: WebhookRequest, once: Once) -> Response:
    """Have a server told about this project's jobs, in messages signed as Standard Webhooks say."""

    def make(_: object) -> Made:
        webhook, secret = service.webhooks.create(caller.tenant_id, body.url, body.events, actor=caller.actor)
        return Made(
            webhook_made(webhook, secret), location=f"/v1/webhooks/{webhook.id}", kept=webhook_made(webhook, None)
        )

    return once.answer(caller, lambda: service.webhook_policy.check_url(body.url), make)


@router.get(
    "/webhooks",
    operation_id="listWebhooks",
    summary="List webhooks, newest first",
    responses={200: shows({"items": [_WEBHOOK], "next_cursor": None}), **responses(*COMMON)},
)
def list_webhooks(service: Service, caller: WebhookWriter, limit: Limit = 50, cursor: Cursor = None) -> WebhookPage:
    """List this project's webhooks by pages, without their secrets."""
    rows = service.webhooks.page(caller.tenant_id, limit=limit + 1, before=read_cursor(cursor, "wh_"))
    page, next_cursor = cut(rows, limit)
    return WebhookPage(items=[webhook_view(webhook) for webhook in page], next_cursor=next_cursor)


@router.get(
    "/webhooks/{webhook_id}",
    operation_id="getWebhook",
    summary="Read a webhook",
    responses={200: shows(_WEBHOOK), **responses(*_ONE)},
)
def get_webhook(service: Service, caller: WebhookWriter, webhook_id: WebhookId) -> WebhookView:
    """Read where a webhook goes, and whether it works."""
    return webhook_view(service.webhooks.get(webhook_id, caller.tenant_id))


@router.patch(
    "/webhooks/{webhook_id}",
    operation_id="changeWebhook",
    summary="Change a webhook",
    dependencies=[JSON_BODY],
    responses={200: shows(_WEBHOOK), **responses(*_ONE, *BODY_PROBLEMS, "webhook-forbidden")},
    openapi_extra=takes(off={"enabled": False}),
)
def change_webhook(service: Service, caller: WebhookWriter, webhook_id: WebhookId, body: WebhookChange) -> WebhookView:
    """Change where a webhook goes and what it hears of, or switch it off and on."""
    if body.url is not None:
        service.webhook_policy.check_url(body.url)
    webhook = service.webhooks.change(
        webhook_id, caller.tenant_id, actor=caller.actor, url=body.url, events=body.events, enabled=body.enabled
    )
    return webhook_view(webhook)


@router.delete(
    "/webhooks/{webhook_id}",
    operation_id="deleteWebhook",
    summary="Delete a webhook",
    status_code=204,
    responses={204: {"description": "It is gone"}, **responses(*_ONE)},
)
def delete_webhook(service: Service, caller: WebhookWriter, webhook_id: WebhookId) -> None:
    """Delete a webhook with the log of its deliveries; what waits is not sent."""
    service.webhooks.delete(webhook_id, caller.tenant_id, actor=caller.actor)


@router.post(
    "/webhooks/{webhook_id}:rotate-secret",
    operation_id="rotateWebhookSecret",
    summary="Replace a webhook's secret",
    response_model=WebhookMade,
    responses={
        200: shows(_MADE, "The new secret, shown this once", headers=idempotency.HEADERS),
        **responses(*_ONE, *idempotency.PROBLEMS),
    },
)
def rotate_webhook_secret(service: Service, caller: WebhookWriter, webhook_id: WebhookId, once: Once) -> Response:
    """Sign with another secret; for a day messages carry the signatures of both, so that no receiver has to hurry."""

    def make(_: None) -> Made:
        webhook, secret = service.webhooks.rotate_secret(webhook_id, caller.tenant_id, actor=caller.actor)
        return Made(webhook_made(webhook, secret), status=200, kept=webhook_made(webhook, None))

    return once.answer(caller, lambda: None, make)


@router.post(
    "/webhooks/{webhook_id}:test",
    operation_id="testWebhook",
    summary="Send a test message",
    status_code=202,
    responses={
        202: shows({**_DELIVERY, "event": "webhook.test"}, "It will be sent"),
        **responses(*_ONE, "quota-exceeded"),
    },
)
def send_test(service: Service, caller: WebhookWriter, webhook_id: WebhookId) -> DeliveryView:
    """Send a message of type `webhook.test`; the log of deliveries tells how it went."""
    return delivery_view(service.webhooks.post_test(webhook_id, caller.tenant_id))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    summary="List a webhook's deliveries, newest first",
    responses={200: shows({"items": [_DELIVERY], "next_cursor": None}), **responses(*_ONE)},
)
def list_deliveries(
    service: Service, caller: WebhookWriter, webhook_id: WebhookId, limit: Limit = 50, cursor: Cursor = None
) -> DeliveryPage:
    """List what was sent in the last 30 days, and what came of it."""
    before = read_cursor(cursor, "msg_")
    rows = service.webhooks.deliveries(webhook_id, caller.tenant_id, limit=limit + 1, before=before)
    page, next_cursor = cut(rows, limit)
    return DeliveryPage(items=[delivery_view(delivery) for delivery in page], next_cursor=next_cursor)


@router.post(
    "/webhooks/{webhook_id}/deliveries/{delivery_id}:redeliver",
    operation_id="redeliver",
    summary="Send a message again",
    status_code=202,
    responses={202: shows(_DELIVERY, "It will be sent again"), **responses(*_ONE)},
)
def redeliver(service: Service, caller: WebhookWriter, webhook_id: WebhookId, delivery_id: DeliveryId) -> DeliveryView:
    """Send a message again, delivered or not, with the same `webhook-id`."""
    return delivery_view(service.webhooks.redeliver(delivery_id, webhook_id, caller.tenant_id))
