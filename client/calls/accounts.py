"""Calls about who may do what, and what they have used: keys, projects, webhooks, the audit log."""

from collections.abc import Sequence
from typing import Any

from client.calls.requests import Call, get, given, post, same, segment
from client.models import Page


def usage(**filters: Any) -> Call[Any]:
    """Read what was used; filters as in the API: since, until, by."""
    return get("/v1/usage", same, **filters)


def quota() -> Call[Any]:
    """Read what may be used."""
    return get("/v1/quota", same)


def create_key(
    name: str, scopes: Sequence[str], *, expires_at: str | None = None, project: str | None = None
) -> Call[Any]:
    """Make an API key, of another project if one is named; the answer's `token` is shown this once."""
    path = "/v1/keys" if project is None else f"/v1/tenants/{_project(project)}/keys"
    return post(path, same, {"name": name, "scopes": list(scopes), "expires_at": expires_at})


def list_keys(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of API keys, newest first."""
    return get("/v1/keys", same, limit=limit, cursor=cursor)


def get_key(key_id: str) -> Call[Any]:
    """Read an API key, without its token."""
    return get(f"/v1/keys/{_key(key_id)}", same)


def rotate_key(key_id: str, *, overlap_seconds: int | None = None) -> Call[Any]:
    """Replace an API key; the old one works on for the overlap."""
    return post(f"/v1/keys/{_key(key_id)}:rotate", same, given(overlap_seconds=overlap_seconds))


def revoke_key(key_id: str) -> Call[Any]:
    """Refuse an API key from now on."""
    return post(f"/v1/keys/{_key(key_id)}:revoke", same)


def _key(key_id: str) -> str:
    return segment(key_id, "key id", "key_0199a1b2...")


def list_audit(*, limit: int | None = None, cursor: str | None = None) -> Call[Page[Any]]:
    """Read a page of the audit log, newest first: who changed what."""
    return get("/v1/audit", Page.of(same), limit=limit, cursor=cursor)


def list_projects(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of projects, newest first."""
    return get("/v1/tenants", same, limit=limit, cursor=cursor)


def get_project(project_id: str) -> Call[Any]:
    """Read a project."""
    return get(f"/v1/tenants/{_project(project_id)}", same)


def create_project(project_id: str, name: str, **limits: Any) -> Call[Any]:
    """Make a project; limits: weight, max_queued, max_running, max_bytes, paused."""
    return post("/v1/tenants", same, {"id": project_id, "name": name, **limits})


def change_project(project_id: str, **changes: Any) -> Call[Any]:
    """Change a project's name, weight, max_queued, max_running, max_bytes or paused; null is no limit."""
    return Call(method="PATCH", path=f"/v1/tenants/{_project(project_id)}", read=same, body=changes)


def _project(project_id: str) -> str:
    return segment(project_id.replace("-", "_"), "project", "zoo") and project_id


def create_webhook(url: str, events: Sequence[str] = ()) -> Call[Any]:
    """Have a URL told about jobs; the answer's `secret` is shown this once."""
    return post("/v1/webhooks", same, {"url": url, "events": list(events)})


def list_webhooks(*, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of webhooks, newest first."""
    return get("/v1/webhooks", same, limit=limit, cursor=cursor)


def get_webhook(webhook_id: str) -> Call[Any]:
    """Read a webhook, without its secret."""
    return get(f"/v1/webhooks/{_webhook(webhook_id)}", same)


def change_webhook(webhook_id: str, **changes: Any) -> Call[Any]:
    """Change a webhook's url, events or enabled."""
    return Call(method="PATCH", path=f"/v1/webhooks/{_webhook(webhook_id)}", read=same, body=changes)


def delete_webhook(webhook_id: str) -> Call[None]:
    """Delete a webhook with the log of its deliveries."""
    return Call(method="DELETE", path=f"/v1/webhooks/{_webhook(webhook_id)}", read=same)


def rotate_webhook(webhook_id: str) -> Call[Any]:
    """Give a webhook a new secret; the answer's `secret` is shown this once."""
    return post(f"/v1/webhooks/{_webhook(webhook_id)}:rotate-secret", same)


def test_webhook(webhook_id: str) -> Call[Any]:
    """Send a test message."""
    return post(f"/v1/webhooks/{_webhook(webhook_id)}:test", same)


def list_deliveries(webhook_id: str, *, limit: int | None = None, cursor: str | None = None) -> Call[Any]:
    """Read a page of what was sent to a webhook, newest first."""
    return get(f"/v1/webhooks/{_webhook(webhook_id)}/deliveries", same, limit=limit, cursor=cursor)


def redeliver(webhook_id: str, delivery_id: str) -> Call[Any]:
    """Send a message again."""
    message = segment(delivery_id, "delivery id", "msg_0199a1b2...")
    return post(f"/v1/webhooks/{_webhook(webhook_id)}/deliveries/{message}:redeliver", same)


def _webhook(webhook_id: str) -> str:
    return segment(webhook_id, "webhook id", "wh_0199a1b2...")
