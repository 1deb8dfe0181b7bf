"""Who may do what: every route by every kind of key."""

import re
from typing import Any

import httpx
import pytest

from service.auth import SCOPES

pytestmark = pytest.mark.integration

ROUTES = [
    ("POST", "/v1/jobs", "jobs:write"),
    ("GET", "/v1/jobs", "jobs:read"),
    ("GET", "/v1/jobs/{id}", "jobs:read"),
    ("POST", "/v1/jobs/{id}:cancel", "jobs:write"),
    ("GET", "/v1/jobs/{id}/layers", "jobs:read"),
    ("GET", "/v1/jobs/{id}/events", "jobs:read"),
    ("GET", "/v1/jobs/{id}/artifact", "artifacts:read"),
    ("GET", "/v1/recipes", "jobs:read"),
    ("POST", "/v1/keys", "keys:admin"),
    ("GET", "/v1/keys", "keys:admin"),
    ("GET", "/v1/keys/{id}", "keys:admin"),
    ("POST", "/v1/keys/{id}:rotate", "keys:admin"),
    ("POST", "/v1/keys/{id}:revoke", "keys:admin"),
    ("GET", "/v1/audit", "keys:admin"),
    ("POST", "/v1/tenants", "tenants:admin"),
    ("GET", "/v1/tenants", "tenants:admin"),
    ("GET", "/v1/tenants/{id}", "tenants:admin"),
    ("PATCH", "/v1/tenants/{id}", "tenants:admin"),
    ("POST", "/v1/tenants/{id}/keys", "tenants:admin"),
    ("POST", "/v1/webhooks", "webhooks:write"),
    ("GET", "/v1/webhooks", "webhooks:write"),
    ("GET", "/v1/webhooks/{id}", "webhooks:write"),
    ("PATCH", "/v1/webhooks/{id}", "webhooks:write"),
    ("DELETE", "/v1/webhooks/{id}", "webhooks:write"),
    ("POST", "/v1/webhooks/{id}:rotate-secret", "webhooks:write"),
    ("POST", "/v1/webhooks/{id}:test", "webhooks:write"),
    ("GET", "/v1/webhooks/{id}/deliveries", "webhooks:write"),
    ("POST", "/v1/webhooks/{id}/deliveries/{id}:redeliver", "webhooks:write"),
]
BODY = {"model": {"source": "demo", "name": "smollm2-135m"}}


def ask(service: Any, method: str, path: str, token: str | None) -> httpx.Response:
    headers = {} if token is None else {"Authorization": token}
    # Without TLS there is no need for the certificates that a client takes long to read.
    with httpx.Client(base_url=service.url, headers=headers, timeout=20, verify=False) as http:
        return http.request(method, path, json=BODY if method != "GET" else None)


def test_the_table_names_every_route(service: Any) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    found = {
        (method.upper(), re.sub(r"\{\w+_id\}", "{id}", path))
        for path, methods in described.items()
        for method in methods
        if path.startswith("/v1")
    }
    assert found == {(method, path) for method, path, _ in ROUTES}


def test_every_route_refuses_a_missing_or_wrong_key(service: Any) -> None:
    job = service.enqueue()
    revoked = service.keys.create("default", "old", ("jobs:read",))
    service.keys.revoke(revoked[0].id, "default")
    expired = service.keys.create("default", "older", ("jobs:read",), expires_at=1)[1]
    wrong = [None, "", "Bearer", "Bearer x", "Basic abc", f"Bearer {revoked[1]}", f"Bearer {expired}"]
    wrong.append(f"Bearer {service.token[:-1]}{'a' if service.token[-1] != 'a' else 'b'}")
    for method, path, _ in ROUTES:
        for token in wrong:
            answer = ask(service, method, path.format(id=job.id), token)
            assert answer.status_code == 401, (method, path, token)
            assert answer.json()["type"] == "urn:duquant:problem:unauthorized"
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert service.jobs.get(job.id).state == "queued"


def test_every_route_refuses_a_key_without_its_scope(service: Any) -> None:
    job = service.enqueue()
    for method, path, scope in ROUTES:
        others = set(SCOPES) - {scope}
        answer = ask(service, method, path.format(id=job.id), f"Bearer {service.key(*others)}")
        assert answer.status_code == 403, (method, path)
        assert scope in answer.json()["detail"]


def test_another_tenants_job_does_not_exist(service: Any, other_tenant: str) -> None:
    job = service.enqueue()
    stranger = f"Bearer {service.key('jobs:read', 'jobs:write', 'artifacts:read', tenant=other_tenant)}"
    for method, path, _ in ROUTES:
        if "/jobs/{id}" in path:
            answer = ask(service, method, path.format(id=job.id), stranger)
            assert answer.status_code == 404, (method, path)
            same = ask(service, method, path.format(id="job_none"), stranger)
            assert same.json()["type"] == answer.json()["type"]
    assert ask(service, "GET", "/v1/jobs", stranger).json()["items"] == []
    assert service.jobs.get(job.id).state == "queued"


def test_equal_work_is_not_shared_between_tenants(service: Any, other_tenant: str) -> None:
    mine = service.http.post("/v1/jobs", json=BODY).json()
    stranger = f"Bearer {service.key('jobs:read', 'jobs:write', tenant=other_tenant)}"
    assert ask(service, "POST", "/v1/jobs", stranger).json()["id"] != mine["id"]


def test_the_session_cookie_is_no_api_key(service: Any) -> None:
    with httpx.Client(base_url=service.url) as http:
        login = http.post("/login", data={"key": service.token}, headers={"Sec-Fetch-Site": "same-origin"})
        assert login.status_code == 303
        assert http.get("/").status_code == 200
        assert http.get("/v1/jobs").status_code == 401


def test_probes_need_no_key_and_tell_no_secret(service: Any) -> None:
    for path in ("/healthz", "/readyz", "/version", "/openapi.json"):
        answer = ask(service, "GET", path, None)
        assert answer.status_code in (200, 503)
        assert service.settings.s3_access_key.get_secret_value() not in answer.text
        assert "127.0.0.1" not in answer.text
