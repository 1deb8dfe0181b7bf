"""API keys over HTTP: made, replaced, revoked; no key gives what it lacks; the projects they belong to."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from infra.database import read
from service.auth import SCOPES

pytestmark = pytest.mark.integration


def ask(service: Any, token: str, method: str, path: str, **options: Any) -> httpx.Response:
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {token}"}, timeout=20) as http:
        return http.request(method, path, **options)


def works(service: Any, token: str) -> bool:
    return ask(service, token, "GET", "/v1/jobs").status_code == 200


def make(service: Any, *scopes: str, **values: Any) -> dict[str, Any]:
    answer = service.http.post("/v1/keys", json={"name": "ci", "scopes": list(scopes), **values})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"/v1/keys/{answer.json()['id']}"
    return answer.json()


def test_a_key_is_made_used_listed_and_revoked(any_service: Any) -> None:
    service = any_service
    key = make(service, "jobs:read", "jobs:read")
    assert key["scopes"] == ["jobs:read"]
    assert works(service, key["token"])
    shown = service.http.get(f"/v1/keys/{key['id']}").json()
    assert shown["state"] == "active"
    assert shown["last_used_at"] is not None
    assert "token" not in shown
    assert [each["name"] for each in service.http.get("/v1/keys").json()["items"]] == ["ci", "bootstrap"]
    for _ in range(2):
        revoked = service.http.post(f"/v1/keys/{key['id']}:revoke")
        assert (revoked.status_code, revoked.json()["state"]) == (200, "revoked")
    assert not works(service, key["token"])


def test_the_token_is_shown_once_and_kept_nowhere(service: Any) -> None:
    body = {"name": "ci", "scopes": ["jobs:read"]}
    headers = {"Idempotency-Key": "once"}
    first = service.http.post("/v1/keys", json=body, headers=headers).json()
    again = service.http.post("/v1/keys", json=body, headers=headers)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert (again.json()["id"], again.json()["token"]) == (first["id"], None)
    secret = first["token"].removeprefix("dq_live_")[8:]
    assert secret not in service.http.get("/v1/keys").text
    assert secret not in service.http.get("/v1/audit").text
    with read(service.app.state.context.engine) as connection:
        names = [row[0] for row in connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'table'"))]
        for name in names:
            assert secret not in str(connection.execute(text(f'SELECT * FROM "{name}"')).all()), name


def test_a_rotated_key_works_on_through_the_overlap(any_service: Any) -> None:
    service = any_service
    old = make(service, "jobs:read")
    new = service.http.post(f"/v1/keys/{old['id']}:rotate").json()
    assert (new["name"], new["scopes"]) == ("ci", ["jobs:read"])
    assert works(service, old["token"])
    assert works(service, new["token"])
    left = datetime.fromisoformat(service.http.get(f"/v1/keys/{old['id']}").json()["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23) < left < timedelta(hours=25)
    at_once = service.http.post(f"/v1/keys/{new['id']}:rotate", json={"overlap_seconds": 0}).json()
    assert not works(service, new["token"])
    assert works(service, at_once["token"])
    assert service.http.get(f"/v1/keys/{new['id']}").json()["state"] == "expired"
    again = service.http.post(f"/v1/keys/{new['id']}:rotate")
    assert (again.status_code, again.json()["type"]) == (409, "urn:duquant:problem:key-conflict")


def test_a_key_ends_when_it_said_it_would(service: Any) -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=8)).isoformat()  # long enough for two calls on a busy machine
    key = make(service, "jobs:read", expires_at=soon)
    assert works(service, key["token"])
    deadline = time.monotonic() + 60
    while works(service, key["token"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert service.http.get(f"/v1/keys/{key['id']}").json()["state"] == "expired"


def test_no_key_gives_what_it_lacks(service: Any) -> None:
    strong = make(service, *SCOPES)
    admin = make(service, "keys:admin", "jobs:read")["token"]
    for scopes in (["jobs:write"], ["jobs:read", "tenants:admin"]):
        answer = ask(service, admin, "POST", "/v1/keys", json={"name": "x", "scopes": scopes})
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:duquant:problem:missing-scope")
        assert scopes[-1] in answer.json()["detail"]
    # Rotating a stronger key would hand out its successor's token.
    answer = ask(service, admin, "POST", f"/v1/keys/{strong['id']}:rotate", json={"overlap_seconds": 0})
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:duquant:problem:missing-scope")
    assert works(service, strong["token"])
    assert ask(service, admin, "POST", "/v1/keys", json={"name": "x", "scopes": ["jobs:read"]}).status_code == 201


def test_no_key_gives_more_time_than_it_has(service: Any) -> None:
    lasting = make(service, "jobs:read")
    soon, later = ((datetime.now(UTC) + timedelta(days=days)).isoformat() for days in (1, 2))
    short = make(service, "keys:admin", "jobs:read", expires_at=soon)
    for wanted in ({}, {"expires_at": later}):
        answer = ask(service, short["token"], "POST", "/v1/keys", json={"name": "x", "scopes": ["jobs:read"], **wanted})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/expires_at")
    # A longer-lived key's successor lives as long, and its token would be the caller's.
    assert ask(service, short["token"], "POST", f"/v1/keys/{lasting['id']}:rotate").status_code == 422
    body = {"name": "x", "scopes": ["jobs:read"], "expires_at": soon}
    assert ask(service, short["token"], "POST", "/v1/keys", json=body).status_code == 201
    # In its own place, too: else it would never have to end.
    answer = ask(service, short["token"], "POST", f"/v1/keys/{short['id']}:rotate")
    assert (answer.status_code, answer.json()["expires_at"]) == (201, short["expires_at"])


WRONG_KEYS = [
    ({}, "/name"),
    ({"name": "", "scopes": ["jobs:read"]}, "/name"),
    ({"name": "a\u0000", "scopes": ["jobs:read"]}, ""),
    ({"name": "x" * 101, "scopes": ["jobs:read"]}, "/name"),
    ({"name": "x", "scopes": []}, "/scopes"),
    ({"name": "x", "scopes": ["root"]}, "/scopes/0"),
    ({"name": "x", "scopes": ["jobs:read"], "expires_at": "2001-01-01T00:00:00Z"}, "/expires_at"),
    ({"name": "x", "scopes": ["jobs:read"], "expires_at": "2100-01-01T00:00:00"}, "/expires_at"),
    ({"name": "x", "scopes": ["jobs:read"], "tenant_id": "other"}, "/tenant_id"),
]


def test_a_wrong_field_of_a_key_is_named(service: Any) -> None:
    for body, pointer in WRONG_KEYS:
        answer = service.http.post("/v1/keys", json=body)
        assert answer.status_code == 422, body
        assert pointer in [error["pointer"] for error in answer.json()["errors"]], body


def test_another_tenants_keys_do_not_exist(service: Any, other_tenant: str) -> None:
    key = make(service, "jobs:read")
    stranger = service.key(*SCOPES, tenant=other_tenant)
    for method, path in (("GET", ""), ("POST", ":rotate"), ("POST", ":revoke")):
        answer = ask(service, stranger, method, f"/v1/keys/{key['id']}{path}")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:duquant:problem:key-not-found")
    assert works(service, key["token"])
    shown = ask(service, stranger, "GET", "/v1/keys").json()["items"]
    assert key["id"] not in [each["id"] for each in shown]
    assert ask(service, stranger, "GET", "/v1/audit").json()["items"][-1]["target"] == shown[-1]["id"]


def test_keys_and_changes_are_listed_by_pages(service: Any) -> None:
    made = [make(service, "jobs:read", name=f"k{number}")["id"] for number in range(3)]
    first = service.http.get("/v1/keys", params={"limit": 2}).json()
    second = service.http.get("/v1/keys", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [each["id"] for each in first["items"]] == made[:0:-1]
    assert [each["name"] for each in second["items"]] == ["k0", "bootstrap"]
    assert second["next_cursor"] is None


def test_the_audit_log_tells_who_did_what(service: Any) -> None:
    key = make(service, "keys:admin", "jobs:read")
    ask(service, key["token"], "POST", "/v1/keys", json={"name": "second", "scopes": ["jobs:read"]})
    first = service.http.get("/v1/audit", params={"limit": 1}).json()
    (entry,) = first["items"]
    assert (entry["action"], entry["actor"], entry["data"]["name"]) == ("key.created", f"key:{key['id']}", "second")
    rest = service.http.get("/v1/audit", params={"cursor": first["next_cursor"]}).json()["items"]
    assert rest[0]["target"] == key["id"]
    # Queues are everybody's: who runs the server sees who paused one, who runs a project does not.
    assert service.http.post("/v1/queues/default:pause").status_code == 200
    (entry,) = service.http.get("/v1/audit", params={"limit": 1}).json()["items"]
    assert (entry["action"], entry["target"]) == ("queue.paused", "default")
    seen = ask(service, key["token"], "GET", "/v1/audit").json()["items"]
    assert {each["action"] for each in seen} == {"key.created"}


def test_a_project_is_made_with_limits_and_a_key_of_its_own(any_service: Any) -> None:
    service = any_service
    body = {"id": "zoo", "name": "Model zoo", "weight": 2.5, "max_queued": 3}
    made = service.http.post("/v1/tenants", json=body)
    assert made.status_code == 201
    assert made.json() | body == made.json()
    taken = service.http.post("/v1/tenants", json=body)
    assert (taken.status_code, taken.json()["type"]) == (409, "urn:duquant:problem:tenant-exists")
    changed = service.http.patch("/v1/tenants/zoo", json={"max_queued": None, "paused": True}).json()
    assert (changed["max_queued"], changed["paused"], changed["weight"], changed["name"]) == (
        None,
        True,
        2.5,
        "Model zoo",
    )
    assert service.http.get("/v1/tenants/zoo").json() == changed
    assert [each["id"] for each in service.http.get("/v1/tenants").json()["items"]] == ["zoo", "default"]
    key = service.http.post("/v1/tenants/zoo/keys", json={"name": "first", "scopes": ["jobs:read", "keys:admin"]})
    token = key.json()["token"]
    assert works(service, token)
    assert ask(service, token, "GET", "/v1/tenants").status_code == 403
    assert [each["name"] for each in ask(service, token, "GET", "/v1/keys").json()["items"]] == ["first"]
    actions = [each["action"] for each in ask(service, token, "GET", "/v1/audit").json()["items"]]
    assert actions == ["key.created", "tenant.changed", "tenant.created"]


def test_a_project_id_is_fit_for_object_keys(service: Any) -> None:
    for tenant in ("../x", "a/b", "A", "-a", "", "a" * 41, "a\n", "ä"):
        answer = service.http.post("/v1/tenants", json={"id": tenant, "name": "x"})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/id"), tenant
    for answer in (
        service.http.get("/v1/tenants/nobody"),
        service.http.patch("/v1/tenants/nobody", json={"paused": True}),
        service.http.post("/v1/tenants/nobody/keys", json={"name": "x", "scopes": ["jobs:read"]}),
    ):
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:duquant:problem:tenant-not-found")


def test_a_bootstrap_key_of_an_older_version_gets_the_new_scopes(service: Any) -> None:
    from service.app import prepare

    context = service.app.state.context
    context.keys.create("default", "bootstrap", ["jobs:read"], token=service.token)
    assert service.http.get("/v1/keys").status_code == 403
    assert prepare(context)
    (key,) = service.http.get("/v1/keys").json()["items"]
    # One that was revoked stays so, and the service starts without.
    service.http.post(f"/v1/keys/{key['id']}:revoke")
    assert prepare(context)
    assert service.http.get("/v1/keys").status_code == 401
