"""Who may do what: every route by every kind of key."""

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from service.auth import SCOPES

pytestmark = pytest.mark.integration

ROUTES = [
    ("POST", "/v1/jobs", "jobs:write"),
    ("GET", "/v1/jobs", "jobs:read"),
    ("GET", "/v1/jobs/{job_id}", "jobs:read"),
    ("PATCH", "/v1/jobs/{job_id}", "jobs:write"),
    ("POST", "/v1/jobs/{job_id}:retry", "jobs:write"),
    ("POST", "/v1/jobs/{job_id}:cancel", "jobs:write"),
    ("GET", "/v1/jobs/{job_id}/layers", "jobs:read"),
    ("GET", "/v1/jobs/{job_id}/events", "jobs:read"),
    ("POST", "/v1/batches", "batches:write"),
    ("POST", "/v1/batches:requantize", "batches:write"),
    ("GET", "/v1/batches", "jobs:read"),
    ("GET", "/v1/batches/{batch_id}", "jobs:read"),
    ("GET", "/v1/batches/{batch_id}/table", "jobs:read"),
    ("POST", "/v1/batches/{batch_id}:cancel", "batches:write"),
    ("POST", "/v1/batches/{batch_id}:retry-failed", "batches:write"),
    ("POST", "/v1/estimates", "jobs:read"),
    ("GET", "/v1/queues", "jobs:read"),
    ("GET", "/v1/queues/{queue}", "jobs:read"),
    ("PUT", "/v1/queues/{queue}", "queue:admin"),
    ("DELETE", "/v1/queues/{queue}", "queue:admin"),
    ("POST", "/v1/queues/{queue}:pause", "queue:admin"),
    ("POST", "/v1/queues/{queue}:resume", "queue:admin"),
    ("GET", "/v1/workers", "queue:admin"),
    ("GET", "/v1/failures", "jobs:read"),
    ("GET", "/v1/artifacts", "artifacts:read"),
    ("GET", "/v1/artifacts/{artifact_id}", "artifacts:read"),
    ("GET", "/v1/artifacts/{artifact_id}/files", "artifacts:read"),
    ("GET", "/v1/artifacts/{artifact_id}/comparison", "artifacts:read"),
    ("PATCH", "/v1/artifacts/{artifact_id}", "artifacts:write"),
    ("DELETE", "/v1/artifacts/{artifact_id}", "artifacts:write"),
    ("PUT", "/v1/artifacts/{artifact_id}/tags/{tag}", "artifacts:write"),
    ("DELETE", "/v1/artifacts/{artifact_id}/tags/{tag}", "artifacts:write"),
    ("GET", "/v1/jobs/{job_id}/artifact", "artifacts:read"),
    ("POST", "/v1/evaluations", "jobs:write"),
    ("GET", "/v1/evaluations", "jobs:read"),
    ("GET", "/v1/evaluations/{evaluation_id}", "jobs:read"),
    ("GET", "/v1/evaluations/{evaluation_id}/report", "jobs:read"),
    ("GET", "/v1/models", "jobs:read"),
    ("POST", "/v1/texts", "jobs:write"),
    ("GET", "/v1/texts", "jobs:read"),
    ("GET", "/v1/texts/{text_id}", "jobs:read"),
    ("DELETE", "/v1/texts/{text_id}", "jobs:write"),
    ("GET", "/v1/recipes", "jobs:read"),
    ("GET", "/v1/usage", "usage:read"),
    ("GET", "/v1/quota", "jobs:read"),
    ("POST", "/v1/keys", "keys:admin"),
    ("GET", "/v1/keys", "keys:admin"),
    ("GET", "/v1/keys/{key_id}", "keys:admin"),
    ("POST", "/v1/keys/{key_id}:rotate", "keys:admin"),
    ("POST", "/v1/keys/{key_id}:revoke", "keys:admin"),
    ("GET", "/v1/audit", "keys:admin"),
    ("POST", "/v1/tenants", "tenants:admin"),
    ("GET", "/v1/tenants", "tenants:admin"),
    ("GET", "/v1/tenants/{tenant_id}", "tenants:admin"),
    ("PATCH", "/v1/tenants/{tenant_id}", "tenants:admin"),
    ("POST", "/v1/tenants/{tenant_id}/keys", "tenants:admin"),
    ("POST", "/v1/webhooks", "webhooks:write"),
    ("GET", "/v1/webhooks", "webhooks:write"),
    ("GET", "/v1/webhooks/{webhook_id}", "webhooks:write"),
    ("PATCH", "/v1/webhooks/{webhook_id}", "webhooks:write"),
    ("DELETE", "/v1/webhooks/{webhook_id}", "webhooks:write"),
    ("POST", "/v1/webhooks/{webhook_id}:rotate-secret", "webhooks:write"),
    ("POST", "/v1/webhooks/{webhook_id}:test", "webhooks:write"),
    ("GET", "/v1/webhooks/{webhook_id}/deliveries", "webhooks:write"),
    ("POST", "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}:redeliver", "webhooks:write"),
]
BODY = {"model": {"source": "demo", "name": "smollm2-135m"}}
BODIES: dict[str, Any] = {
    "PATCH /v1/jobs/{job_id}": {"priority": 5},
    "PATCH /v1/artifacts/{artifact_id}": {"expires_at": None},
    "PATCH /v1/webhooks/{webhook_id}": {"enabled": False},
    "POST /v1/keys/{key_id}:rotate": {"overlap_seconds": 0},
}
"""What a change has to look like to get as far as the question whose thing it is."""


@pytest.fixture
def ask(service: Any) -> Iterator[Callable[..., httpx.Response]]:
    """Ask with any Authorization header, or with none."""
    with httpx.Client(base_url=service.url, timeout=20) as http:

        def request(method: str, path: str, token: str | None, body: Any = BODY) -> httpx.Response:
            headers = {"Idempotency-Key": uuid.uuid4().hex} | ({} if token is None else {"Authorization": token})
            return http.request(method, path, headers=headers, json=body if method != "GET" else None)

        yield request


def fill(path: str, ids: dict[str, str]) -> str:
    """Put ids into a path; what is not an id gets a harmless name."""
    names = re.findall(r"\{(\w+)\}", path)
    return path.format(**{name: ids.get(name, "default") for name in names})


def make_one_of_each(service: Any) -> dict[str, str]:
    """Make one of everything that a path can name, in the default tenant."""
    job = service.finished_job(layers=1)
    (artifact,) = service.http.get("/v1/artifacts").json()["items"]
    evaluation = service.http.post("/v1/evaluations", json={"artifact": artifact["id"]})
    assert evaluation.status_code == 201, evaluation.text
    claim = service.claim()
    service.jobs.complete(claim, {"artifact_job_id": job.id, "metrics": {"perplexity": 9.5}, "seconds": 1.0})
    (evaluated,) = service.http.get("/v1/evaluations").json()["items"]
    batch = {"models": [BODY["model"]], "recipes": ["rtn"], "force": True}
    made = service.http.post("/v1/batches", json=batch, headers={"Idempotency-Key": "one"})
    assert made.status_code == 201, made.text
    webhook = service.http.post("/v1/webhooks", json={"url": "https://example.com/"}).json()["id"]
    text = service.http.post("/v1/texts?name=mine", content="It was.", headers={"Content-Type": "text/plain"})
    return {
        "job_id": job.id,
        "batch_id": made.json()["id"],
        "artifact_id": artifact["id"],
        "evaluation_id": evaluated["id"],
        "key_id": service.http.get("/v1/keys").json()["items"][0]["id"],
        "webhook_id": webhook,
        "delivery_id": service.http.post(f"/v1/webhooks/{webhook}:test").json()["id"],
        "tenant_id": "default",
        "text_id": text.json()["id"],
    }


def test_the_table_names_every_route(service: Any) -> None:
    described = service.http.get("/openapi.json").json()["paths"]
    found = {
        (method.upper(), path) for path, methods in described.items() for method in methods if path.startswith("/v1")
    }
    assert found == {(method, path) for method, path, _ in ROUTES}


def test_every_route_refuses_a_missing_or_wrong_key(service: Any, ask: Callable[..., httpx.Response]) -> None:
    job = service.enqueue()
    revoked = service.keys.create("default", "old", SCOPES)
    service.keys.revoke(revoked[0].id, "default")
    expired = service.keys.create("default", "older", SCOPES, expires_at=1)[1]
    wrong = [None, "", "Bearer", "Bearer x", "Basic abc", f"Bearer {revoked[1]}", f"Bearer {expired}"]
    wrong.append(f"Bearer {service.token[:-1]}{'a' if service.token[-1] != 'a' else 'b'}")
    for method, path, _ in ROUTES:
        for token in wrong:
            answer = ask(method, fill(path, {"job_id": job.id}), token)
            assert answer.status_code == 401, (method, path, token)
            assert answer.json()["type"] == "urn:duquant:problem:unauthorized"
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert service.jobs.get(job.id).state == "queued"


def test_a_body_is_not_read_before_the_key_is_looked_at(service: Any) -> None:
    with httpx.Client(base_url=service.url) as http:
        answer = http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
        assert answer.json()["type"] == "urn:duquant:problem:unauthorized"
        reader = {"Authorization": f"Bearer {service.key('jobs:read')}", "Content-Type": "application/json"}
        assert http.post("/v1/jobs", content=b"{", headers=reader).json()["type"] == "urn:duquant:problem:missing-scope"
    good = service.http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
    assert good.json()["type"] == "urn:duquant:problem:malformed-request"


def test_every_route_refuses_a_query_parameter_that_it_does_not_have(
    service: Any, ask: Callable[..., httpx.Response]
) -> None:
    bearer = f"Bearer {service.token}"
    for method, path, _ in ROUTES:
        answer = ask(method, fill(path, {}) + "?colour=blue", bearer)
        errors = answer.json()["errors"]
        assert (answer.status_code, errors[0]["location"], errors[0]["pointer"]) == (422, "query", "/colour"), path
    assert service.http.get("/v1/jobs").json()["items"] == []


def test_every_route_refuses_a_key_without_its_scope(service: Any, ask: Callable[..., httpx.Response]) -> None:
    job = service.enqueue()
    keys = {scope: f"Bearer {service.key(*(set(SCOPES) - {scope}))}" for scope in SCOPES}
    for method, path, scope in ROUTES:
        answer = ask(method, fill(path, {"job_id": job.id}), keys[scope])
        assert answer.status_code == 403, (method, path)
        assert scope in answer.json()["detail"]
    assert service.jobs.get(job.id).state == "queued"


def test_what_is_another_tenants_does_not_exist(
    service: Any, other_tenant: str, ask: Callable[..., httpx.Response]
) -> None:
    ids = make_one_of_each(service)
    stranger = f"Bearer {service.key(*(set(SCOPES) - {'tenants:admin'}), tenant=other_tenant)}"
    # Of the right form, and nobody's.
    nothing = {name: value[:-8] + "0" * 8 for name, value in ids.items()}
    for method, path, scope in ROUTES:
        query = f"?with={ids['artifact_id']}" if path.endswith("/comparison") else ""
        body = BODIES.get(f"{method} {path}", BODY)
        if "_id}" in path and scope != "tenants:admin":
            theirs = ask(method, fill(path, ids) + query, stranger, body)
            nobodys = ask(method, fill(path, nothing) + query, stranger, body)
            assert (theirs.status_code, nobodys.status_code) == (404, 404), (method, path, theirs.text)
            assert theirs.json()["type"] == nobodys.json()["type"]
            # Not even the words tell which of the two it was.
            told = theirs.json()["detail"]
            for name, value in ids.items():
                told = told.replace(value, nothing[name])
            assert told == nobodys.json()["detail"], (method, path)
    for path in ("/v1/jobs", "/v1/batches", "/v1/artifacts", "/v1/evaluations", "/v1/webhooks"):
        assert ask("GET", path, stranger).json()["items"] == [], path
    assert [key["name"] for key in ask("GET", "/v1/keys", stranger).json()["items"]] == ["test"]
    # And nothing of it was touched.
    for path, name in (
        ("jobs", "job_id"),
        ("artifacts", "artifact_id"),
        ("webhooks", "webhook_id"),
        ("keys", "key_id"),
    ):
        answer = service.http.get(f"/v1/{path}/{ids[name]}")
        assert answer.status_code == 200, path
        assert answer.json().get("enabled", True)


def test_equal_work_is_not_shared_between_tenants(
    service: Any, other_tenant: str, ask: Callable[..., httpx.Response]
) -> None:
    mine = service.http.post("/v1/jobs", json=BODY).json()
    stranger = f"Bearer {service.key('jobs:read', 'jobs:write', tenant=other_tenant)}"
    assert ask("POST", "/v1/jobs", stranger).json()["id"] != mine["id"]


def test_the_session_cookie_is_no_api_key(service: Any) -> None:
    with httpx.Client(base_url=service.url) as http:
        login = http.post("/login", data={"key": service.token}, headers={"Sec-Fetch-Site": "same-origin"})
        assert login.status_code == 303
        assert http.get("/").status_code == 200
        assert http.get("/v1/jobs").status_code == 401


def test_probes_need_no_key_and_tell_no_secret(service: Any, ask: Callable[..., httpx.Response]) -> None:
    for path in ("/healthz", "/readyz", "/version", "/openapi.json"):
        answer = ask("GET", path, None)
        assert answer.status_code in (200, 503)
        assert service.settings.s3_access_key.get_secret_value() not in answer.text
        assert "127.0.0.1" not in answer.text
